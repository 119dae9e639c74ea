-- How many tokens a request used, by what its answer says. Bytes pass as they come; what is looked at is where the answer ends, and little of it.
--
--   of_json(text)        of a whole answer: {prompt, cached, completion, seconds}, each nil where the answer does not tell it; or nil when none is.
--                        prompt has the cached ones in it; seconds are those of a sound
--   answer()             the same for an answer that comes in chunks: feed(chunk) each, then result()
--   stream(ours)         for a stream of events. chunk = feed(chunk, last): what may go on to the client. With `ours`, the gateway has asked for the
--                        usage and the client has not: the event that tells nothing else is taken out. result(prompt): as above; where the stream
--                        ended early, `estimated` is true, completion is the number of its events and prompt what the caller guesses
--   ask(text, fields)    what stream_options has to be in a body so that its stream tells the usage; nil when the client asks for it itself, or wants
--                        no stream. `fields` are those that scan found: stream and stream_options
local ffi = require "ffi"
local scan = require "scan"

local find, match, sub = string.find, string.match, string.sub

local usage = {}

-- More than any account has; something else that has the name is let go.
local LONGEST = 65536
local LONGEST_NAME = 32

-- What an account says.

-- Most answers have few of the names, so they are looked for without a pattern first: that is compiled.
local function number(text, quoted)
    local at = find(text, quoted, 1, true)
    return at and tonumber(match(text, "^%s*:%s*(%d+%.?%d*)", at + #quoted))
end

-- OpenAI's account has everything in its prompt; Anthropic's has apart what was in the cache, or went there.
local function numbers(text)
    local read = number(text, '"cache_read_input_tokens"')
    local prompt = number(text, '"prompt_tokens"') or number(text, '"input_tokens"')
    return {
        prompt = prompt and prompt + (read or 0) + (number(text, '"cache_creation_input_tokens"') or 0),
        cached = read or number(text, '"cached_tokens"'),
        completion = number(text, '"completion_tokens"') or number(text, '"output_tokens"'),
        seconds = number(text, '"seconds"'),
    }
end

-- Answers: follows the nesting of a JSON text, to find the account where it belongs and not in what a client or a model wrote.

local QUOTE, BACKSLASH, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST = 0x22, 0x5c, 0x7b, 0x7d, 0x5b, 0x5d
local mark = ffi.new("uint8_t[256]")
for _, byte in ipairs { QUOTE, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST } do
    mark[byte] = 1
end
-- Where it may be: at the top, in what an event is about, and in the meta of Cohere's answers.
local ACCOUNTS = { ["usage"] = true, ["meta"] = true, ["response usage"] = true, ["message usage"] = true }

local Answer = {}
Answer.__index = Answer

function usage.answer()
    -- all names from the beginning: a table that grows costs more
    return setmetatable({
        depth = 0, in_string = false, backslashes = 0, name = "", name_from = false, name_to = 0, within = "",
        pieces = false, from = 0, length = 0, bottom = 0, found = nil,
    }, Answer)
end

-- Whether the byte at `at` is escaped: an odd number of backslashes before it, those of the last chunk included.
local function escaped(self, chunk, at)
    local count = 0
    while at - count > 1 and chunk:byte(at - count - 1) == BACKSLASH do
        count = count + 1
    end
    if at - count == 1 then
        count = count + self.backslashes
    end
    return count % 2 == 1
end

-- Goes on in a string from position `at` of the chunk (1 is the first); the position behind its part here.
local function string_part(self, chunk, at)
    local quote = find(chunk, '"', at, true)
    while quote and escaped(self, chunk, quote) do
        quote = find(chunk, '"', quote + 1, true)
    end
    self.in_string = quote == nil
    self.name_from, self.name_to = at, quote and quote - 1 or #chunk
    return quote and quote + 1 or #chunk + 1
end

-- The last string, as far as it can be the name of an account. Most are none, so it is cut out of its chunk only when somebody asks.
local function name_of(self, chunk)
    if self.name_from then
        self.name = sub(self.name .. sub(chunk, self.name_from, math.min(self.name_to, self.name_from + LONGEST_NAME)), 1, LONGEST_NAME)
        self.name_from = false
    end
    return self.name
end

-- An object or a list begins. Its name is the last string before it.
local function open(self, chunk, byte, at)
    self.depth = self.depth + 1
    if self.depth == 2 or self.depth == 3 then
        local name = name_of(self, chunk)
        local path = self.depth == 2 and name or self.within .. " " .. name
        if self.depth == 2 then
            self.within = name
        end
        if byte == OPEN and ACCOUNTS[path] and not self.pieces then
            self.pieces, self.from, self.length, self.bottom = {}, at, 0, self.depth
        end
    end
    self.name, self.name_from = "", false
end

local function keep(self, chunk, to)
    self.pieces[#self.pieces + 1] = sub(chunk, self.from, to)
    self.length = self.length + to - self.from + 1
    self.from = 1
    if self.length > LONGEST then
        self.pieces = false
    end
end

local function close(self, chunk, at)
    if self.pieces and self.depth == self.bottom then
        keep(self, chunk, at)
        self.found = self.pieces and numbers(table.concat(self.pieces)) or self.found
        self.pieces = false
    end
    self.depth = self.depth - 1
end

local function trailing_backslashes(self, chunk)
    local count = 0
    while count < #chunk and chunk:byte(#chunk - count) == BACKSLASH do
        count = count + 1
    end
    return count == #chunk and count + self.backslashes or count
end

-- One loop without another in it, which LuaJIT compiles.
local function walk(self, chunk, i)
    local bytes, size = ffi.cast("const uint8_t *", chunk), #chunk
    while i < size do
        local byte = bytes[i]
        i = i + 1
        if mark[byte] == 1 then
            if byte == QUOTE then
                self.name, self.backslashes = "", 0
                i = string_part(self, chunk, i + 1) - 1
            elseif byte == OPEN or byte == OPEN_LIST then
                open(self, chunk, byte, i)
            else
                close(self, chunk, i)
            end
        end
    end
end

function Answer:feed(chunk)
    walk(self, chunk, self.in_string and string_part(self, chunk, 1) - 1 or 0)
    name_of(self, chunk)
    if self.pieces then
        keep(self, chunk, #chunk)
    end
    self.backslashes = self.in_string and trailing_backslashes(self, chunk) or 0
end

function Answer:result()
    return self.found
end

function usage.of_json(text)
    local answer = usage.answer()
    answer:feed(text)
    return answer:result()
end

-- Streams.

local Stream = {}
Stream.__index = Stream

function usage.stream(ours)
    return setmetatable({ ours = ours, pieces = {}, edge = "", tokens = 0, found = {} }, Stream)
end

-- The last byte of the blank line that ends an event.
local function event_end(text, from)
    local short, long = find(text, "\n\n", from, true), find(text, "\n\r\n", from, true)
    if short and (not long or short < long) then
        return short + 1
    end
    return long and long + 2
end

-- Takes up what an event says of the usage. Returns whether it says nothing else.
local function account(self, event)
    local answer = usage.answer()
    answer:feed(event)
    local told = answer:result()
    if not told then
        return false
    end
    for name, value in pairs(told) do
        self.found[name] = value
    end
    local alone = find(event, '"choices"%s*:%s*%[%s*%]') ~= nil
    self.ended = self.ended or alone or find(event, '"type"%s*:%s*"response%.') ~= nil or find(event, '"type"%s*:%s*"message_delta"') ~= nil
    return alone
end

-- Looks at an event. Returns whether it is one that only the gateway wanted.
local function note(self, event)
    if find(event, '"delta"', 1, true) or find(event, '"text_completion"', 1, true) then
        self.tokens = self.tokens + 1
    end
    return find(event, '"usage"', 1, true) and account(self, event) and self.ours
end

-- The events of a text without those that only the gateway wanted, and what is left of an event at its end. `at` is where to look for its first end.
local function events(self, text, at)
    local kept, from, begin = {}, 1, 1
    local stop = event_end(text, at)
    while stop do
        if note(self, sub(text, begin, stop)) then
            kept[#kept + 1] = sub(text, from, begin - 1)
            from = stop + 1
        end
        begin = stop + 1
        stop = event_end(text, begin)
    end
    kept[#kept + 1] = sub(text, from, begin - 1)
    return table.concat(kept), sub(text, begin)
end

local function hold(self, text)
    self.pieces[#self.pieces + 1] = text
    self.edge = sub(self.edge .. text, -2)
end

local function held(self)
    local text = table.concat(self.pieces)
    self.pieces, self.edge = {}, ""
    return text
end

-- What the chunk completes. An event is put together once, when its end has come, however many chunks it has.
local function complete(self, chunk)
    if #self.pieces == 0 then
        return events(self, chunk, 1)
    elseif not event_end(self.edge .. chunk, 1) then
        return "", chunk
    end
    local before = held(self)
    return events(self, before .. chunk, math.max(#before - 1, 1))
end

function Stream:feed(chunk, last)
    local whole, rest = complete(self, chunk)
    if rest ~= "" then
        hold(self, rest)
    end
    if last then
        local left = held(self)
        whole = note(self, left) and whole or whole .. left
    end
    return self.ours and whole or chunk
end

function Stream:result(prompt)
    local found = self.found
    if self.ended then
        return found
    end
    return {
        prompt = found.prompt or self.tokens > 0 and prompt or 0, cached = found.cached,
        completion = math.max(found.completion or 0, self.tokens), estimated = true,
    }
end

-- Asking for it.

-- What vLLM takes for true beside true, by pydantic's rules: 1 as a number, and these as a string in whatever letters.
local TRUE = { ["1"] = true, on = true, t = true, ["true"] = true, y = true, yes = true }

local function is_true(text, field)
    if field.type == "number" then
        return tonumber(sub(text, field.from, field.to)) == 1
    end
    return field.type == "true"
        or field.type == "string" and field.to - field.from < LONGEST_NAME and TRUE[scan.string(text, field):lower()] == true
end

function usage.ask(text, fields)
    local options = fields.stream_options
    if not fields.stream or not is_true(text, fields.stream) then
        return nil
    elseif not options or options.type == "null" then
        return '{"include_usage":true}'
    elseif options.type ~= "object" then
        return nil
    end
    local inner = sub(text, options.from, options.to)
    local asked, object = scan.scan(inner, { include_usage = true, continuous_usage_stats = true })
    local already = asked.include_usage
    if already and already.type ~= "false" and already.type ~= "null" then
        return nil
    end
    -- on its own the second does nothing; with the first it would put an account into each event
    return scan.edit(inner, asked, object, { include_usage = "true", continuous_usage_stats = false })
end

return usage
