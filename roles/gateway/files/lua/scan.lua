-- Finds the top-level members of a JSON object, and changes some of them, without decoding the rest.
--
-- A body has up to tens of megabytes and is passed on byte for byte: decoded and encoded again, empty lists would become objects and large integers
-- would be rounded. So the text is walked once, by a table of states, and what changes is spliced in. What the server behind (Python's json)
-- refuses is refused here as well, so that the two never read a text differently: the last of namesakes counts, escapes in names are read.
-- Stricter than Python: NaN and Infinity are no numbers, no mark of the byte order comes first, nesting ends at DEPTH, namesakes at NAMESAKES.
--
--   scan(text, wanted, pause)  the members named in the set `wanted`: {name = field}, and the object they are in; or nil and why not.
--                              field: key_from, key_to, from, to (positions of first and last bytes), type, more (earlier fields of this name).
--                              pause() is called after each STRETCH of bytes, so that a large body does not hold up its worker
--   string(text, field)        what a string says
--   splice(text, changes)      the text with each change {from, to, text} made; an insertion has to = from - 1
--   without(text, field)       the text without a member and its earlier namesakes
--   with(text, name, json)     the text with one more member, at its end
--   edit(text, fields, object, wishes)  all of it at once. wishes: {name = JSON text to replace or add it with, or false to remove it}
local bit = require "bit"
local ffi = require "ffi"

local band, bnot, bor, bxor = bit.band, bit.bnot, bit.bor, bit.bxor
local char, find, floor, min, sub = string.char, string.find, math.floor, math.min, string.sub

local scan = { DEPTH = 1024, STRETCH = 131072, NAMESAKES = 32 }

-- The states: step[state + byte] is the next one, or from ERROR on something that the table alone cannot do. A state is where its row starts.

local ROW, ROWS = 256, 96
local ERROR = ROWS * ROW
local STRING, KEY, OPEN_OBJECT, OPEN_ARRAY, CLOSE, START, TOP_KEY, TOP_VALUE, TOP_COMMA =
    ERROR + 1, ERROR + 2, ERROR + 3, ERROR + 4, ERROR + 5, ERROR + 6, ERROR + 7, ERROR + 8, ERROR + 9
local SPACES, DIGITS, NONZERO = " \t\r\n", "0123456789", "123456789"
local step = ffi.new("uint16_t[?]", ROWS * ROW)
for index = 0, ROWS * ROW - 1 do step[index] = ERROR end

local function go(from, characters, to)
    for index = 1, #characters do step[from + characters:byte(index)] = to end
end

local states = -ROW

-- Within a number or a word.
local function part()
    states = states + ROW
    return states
end

-- Between them, where spaces may stand.
local function place()
    local made = part()
    go(made, SPACES, made)
    return made
end

-- A number or a word may be over here: what comes then is what comes after it.
local function may_end(from, after)
    for byte = 0, 255 do
        if step[from + byte] == ERROR then step[from + byte] = step[after + byte] end
    end
end

local function numbers(value, after)
    local minus, zero, whole, point, fraction, e, sign, power = part(), part(), part(), part(), part(), part(), part(), part()
    go(value, "-", minus)
    for _, from in ipairs { value, minus } do go(from, "0", zero) go(from, NONZERO, whole) end
    go(whole, DIGITS, whole)
    for _, from in ipairs { zero, whole } do go(from, ".", point) end
    for _, from in ipairs { point, fraction } do go(from, DIGITS, fraction) end
    for _, from in ipairs { zero, whole, fraction } do go(from, "eE", e) end
    go(e, "+-", sign)
    for _, from in ipairs { e, sign, power } do go(from, DIGITS, power) end
    for _, from in ipairs { zero, whole, fraction, power } do may_end(from, after) end
end

local function word(value, letters, after)
    local from = value
    for index = 1, #letters - 1 do
        local to = part()
        go(from, letters:sub(index, index), to)
        from = to
    end
    go(from, letters:sub(-1), after)
end

-- Any value, where `value` expects one, and then what `after` expects.
local function values(value, after)
    numbers(value, after)
    word(value, "true", after)
    word(value, "false", after)
    word(value, "null", after)
    go(value, '"', STRING)
    go(value, "{", OPEN_OBJECT)
    go(value, "[", OPEN_ARRAY)
end

-- [ item , item ]
local FIRST_ITEM, ITEM, AFTER_ITEM = place(), place(), place()
go(AFTER_ITEM, ",", ITEM)
go(AFTER_ITEM, "]", CLOSE)
values(ITEM, AFTER_ITEM)
values(FIRST_ITEM, AFTER_ITEM)
go(FIRST_ITEM, "]", CLOSE)

-- { key : member , key : member }
local FIRST_KEY, NEXT_KEY, COLON, MEMBER, AFTER_MEMBER = place(), place(), place(), place(), place()
go(FIRST_KEY, '"', KEY)
go(FIRST_KEY, "}", CLOSE)
go(NEXT_KEY, '"', KEY)
go(COLON, ":", MEMBER)
go(AFTER_MEMBER, ",", NEXT_KEY)
go(AFTER_MEMBER, "}", CLOSE)
values(MEMBER, AFTER_MEMBER)

-- The same at the top, where the walk stops at each key, value and comma to note where they are; and what is around it.
local BEFORE, FIRST_TOP, NEXT_TOP, TOP_COLON = place(), place(), place(), place()
local BEFORE_TOP, TOP, AFTER_TOP, BEHIND = place(), place(), place(), place()
go(BEFORE, "{", START)
go(FIRST_TOP, '"', TOP_KEY)
go(FIRST_TOP, "}", CLOSE)
go(NEXT_TOP, '"', TOP_KEY)
go(TOP_COLON, ":", BEFORE_TOP)
go(BEFORE_TOP, '"{[-tfn' .. DIGITS, TOP_VALUE)
go(AFTER_TOP, ",", TOP_COMMA)
go(AFTER_TOP, "}", CLOSE)
values(TOP, AFTER_TOP)
assert(states < ERROR)

-- Strings.

local QUOTE, BACKSLASH = 0x22, 0x5c
local plain = ffi.new("uint8_t[256]")
for byte = 0x20, 0xff do plain[byte] = 1 end
plain[QUOTE], plain[BACKSLASH] = 0, 0

-- How many bytes an escape has, by its letter.
local escape = ffi.new("uint8_t[256]")
for letter in ('"\\/bfnrt'):gmatch "." do escape[letter:byte()] = 2 end
escape[("u"):byte()] = 6

local hexadecimal = ffi.new("uint8_t[256]")
for digit in ("0123456789abcdefABCDEF"):gmatch "." do hexadecimal[digit:byte()] = 1 end

local words = ffi.typeof "const uint64_t *"
local ONES, HIGH = 0x0101010101010101ULL, 0x8080808080808080ULL
local QUOTES, BACKSLASHES, CONTROLS = ONES * QUOTE, ONES * BACKSLASH, ONES * 0x20

-- The first byte from `i` on that ends a run of plain ones. Eight are looked at together: x - ONES borrows into the high bit of a byte that is zero.
local function run_end(bytes, i, stop)
    while i + 8 <= stop do
        local x = ffi.cast(words, bytes + i)[0]
        local q, b = bxor(x, QUOTES), bxor(x, BACKSLASHES)
        if band(bor(band(q - ONES, bnot(q)), band(b - ONES, bnot(b)), band(x - CONTROLS, bnot(x))), HIGH) ~= 0 then break end
        i = i + 8
    end
    while i < stop and plain[bytes[i]] == 1 do i = i + 1 end
    return i
end

-- The position behind an escape, or nil. A text ends with a zero byte, which is part of no escape.
local function escape_end(bytes, i)
    local length = escape[bytes[i + 1]]
    if length == 0 then return nil end
    for digit = i + 2, i + length - 1 do
        if hexadecimal[bytes[digit]] == 0 then return nil end
    end
    return i + length
end

-- What a string says.

local LETTERS = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

local function utf8(code)
    if code < 0x80 then return char(code) end
    if code < 0x800 then return char(0xc0 + floor(code / 64), 0x80 + code % 64) end
    if code < 0x10000 then return char(0xe0 + floor(code / 4096), 0x80 + floor(code / 64) % 64, 0x80 + code % 64) end
    return char(0xf0 + floor(code / 262144), 0x80 + floor(code / 4096) % 64, 0x80 + floor(code / 64) % 64, 0x80 + code % 64)
end

-- Two halves that belong together are one character; a half alone stays one.
local function pair(high, low)
    local first, second = tonumber(high, 16), tonumber(low, 16)
    if first < 0xd800 or first > 0xdbff or second < 0xdc00 or second > 0xdfff then return nil end
    return utf8(0x10000 + (first - 0xd800) * 1024 + second - 0xdc00)
end

-- The character of the escape at `at`, and how many bytes the escape has.
local function unescape(raw, at)
    local letter = sub(raw, at + 1, at + 1)
    if letter ~= "u" then return LETTERS[letter] or letter, 2 end
    local code = sub(raw, at + 2, at + 5)
    if sub(raw, at + 6, at + 7) == "\\u" then
        local both = pair(code, sub(raw, at + 8, at + 11))
        if both then return both, 12 end
    end
    return utf8(tonumber(code, 16)), 6
end

-- What stands between two quotes, without the escapes.
local function said(raw)
    local at = find(raw, "\\", 1, true)
    if not at then return raw end
    local pieces, done = {}, 1
    while at do
        local character, length = unescape(raw, at)
        pieces[#pieces + 1] = sub(raw, done, at - 1)
        pieces[#pieces + 1] = character
        done = at + length
        at = find(raw, "\\", done, true)
    end
    return table.concat(pieces) .. sub(raw, done)
end

function scan.string(text, field)
    return said(sub(text, field.from + 1, field.to - 1))
end

-- The walk.

-- Another stretch, when there is any text left.
local function more(walk)
    if walk.stop == walk.size then return false end
    if walk.stop > 0 then walk.pause() end
    walk.stop = min(walk.size, walk.stop + scan.STRETCH)
    return true
end

-- The position behind a string whose first byte is at `i`; or nil and where it is broken.
local function string_end(walk, i)
    local bytes = walk.bytes
    while true do
        i = run_end(bytes, i, walk.stop)
        if i >= walk.stop then
            if not more(walk) then return nil, walk.size end
        elseif bytes[i] == QUOTE then
            return i + 1
        else
            local behind = bytes[i] == BACKSLASH and escape_end(bytes, i)
            if not behind then return nil, i end
            i = behind
        end
    end
end

-- Steps until the table alone can do no more, or the stretch is over.
local function steps(bytes, state, i, stop)
    while i < stop do
        state = step[state + bytes[i]]
        i = i + 1
        if state >= ERROR then break end
    end
    return state, i
end

local TYPES = { ['"'] = "string", ["{"] = "object", ["["] = "array", t = "true", f = "false", n = "null" }

-- Notes the key between the quotes at key_from and key_to, when anybody wants to know of it.
local function note_key(walk, key_from, key_to)
    walk.members = walk.members + 1
    walk.field = false
    if key_to - key_from - 1 > walk.longest then return end
    local key = said(sub(walk.text, key_from + 1, key_to - 1))
    if walk.wanted[key] then
        walk.field = { key_from = key_from, key_to = key_to, from = false, to = false, type = false, more = false }
        walk.key = key
    end
end

-- Notes where a value ends, which may be many spaces ago.
local function note_end(walk, i)
    local field, bytes = walk.field, walk.bytes
    if not field or field.to then return end
    repeat i = i - 1 until step[BEFORE + bytes[i]] ~= BEFORE
    field.to = i + 1
end

local function note_value(walk, i)
    note_end(walk, i)
    local field = walk.field
    if not field then return end
    walk.field = false
    field.type = TYPES[sub(walk.text, field.from, field.from)] or "number"
    local before = walk.fields[walk.key]
    if before then
        field.more, before.more = before.more or {}, false
        field.more[#field.more + 1] = before
        walk.crowded = walk.crowded or #field.more >= scan.NAMESAKES
    end
    walk.fields[walk.key] = field
end

-- The longest that a name can be, written with nothing but escapes. What is wanted are few sets, each of them often.
local lengths = setmetatable({}, { __mode = "k" })

local function longest(wanted)
    local most = lengths[wanted]
    if not most then
        most = 0
        for name in pairs(wanted) do most = math.max(most, #name * 6) end
        lengths[wanted] = most
    end
    return most
end

local function broken(walk, at)
    if at >= walk.size then return nil, "the JSON ends too early" end
    return nil, "the JSON is broken at byte " .. at + 1
end

local function excess(walk)
    if walk.depth > scan.DEPTH then return "the JSON is nested more than " .. scan.DEPTH .. " deep" end
    if walk.crowded then return "the JSON has " .. walk.key .. " more than " .. scan.NAMESAKES .. " times" end
end

-- What each special step does: it gets the walk and the position behind the byte, returns the next state and position; or nil and where it is broken.
local special = {}

special[ERROR] = function(_, i) return nil, i - 1 end

special[STRING] = function(walk, i)
    local behind, at = string_end(walk, i)
    if not behind then return nil, at end
    return walk.after, behind
end

special[KEY] = function(walk, i)
    local behind, at = string_end(walk, i)
    if not behind then return nil, at end
    return COLON, behind
end

local function open(walk, after)
    walk.stack[walk.depth] = walk.after
    walk.depth = walk.depth + 1
    walk.after = after
end

special[OPEN_OBJECT] = function(walk, i)
    open(walk, AFTER_MEMBER)
    return FIRST_KEY, i
end

special[OPEN_ARRAY] = function(walk, i)
    open(walk, AFTER_ITEM)
    return FIRST_ITEM, i
end

special[CLOSE] = function(walk, i)
    walk.depth = walk.depth - 1
    if walk.depth == 0 then
        note_value(walk, i - 1)
        walk.to = i
        return BEHIND, i
    end
    walk.after = walk.stack[walk.depth]
    return walk.after, i
end

special[START] = function(walk, i)
    walk.from, walk.depth, walk.after = i, 1, AFTER_TOP
    return FIRST_TOP, i
end

special[TOP_KEY] = function(walk, i)
    local behind, at = string_end(walk, i)
    if not behind then return nil, at end
    note_key(walk, i, behind)
    return TOP_COLON, behind
end

special[TOP_VALUE] = function(walk, i)
    if walk.field then walk.field.from = i end
    return TOP, i - 1
end

special[TOP_COMMA] = function(walk, i)
    note_value(walk, i - 1)
    return NEXT_TOP, i
end

local function go_on() end

-- All names from the beginning: a table that grows costs more.
local function start(text, wanted, pause)
    return {
        text = text, bytes = ffi.cast("const uint8_t *", text), size = #text, stop = 0, pause = pause or go_on,
        wanted = wanted, longest = longest(wanted), fields = {}, members = 0, field = false, key = false, crowded = false,
        depth = 0, stack = {}, after = BEFORE, from = 0, to = 0,
    }
end

function scan.scan(text, wanted, pause)
    local walk = start(text, wanted, pause)
    local state, i = BEFORE, 0
    while true do
        if i >= walk.stop then
            if state == AFTER_TOP then note_end(walk, i) end
            if not more(walk) then break end
        end
        state, i = steps(walk.bytes, state, i, walk.stop)
        if state >= ERROR then
            state, i = special[state](walk, i)
            if not state then return broken(walk, i) end
            local why = excess(walk)
            if why then return nil, why end
        end
    end
    if state ~= BEHIND then return broken(walk, walk.size) end
    return walk.fields, { from = walk.from, to = walk.to, members = walk.members }
end

-- Changes.

function scan.splice(text, changes)
    table.sort(changes, function(one, other) return one.from < other.from end)
    local pieces, done = {}, 1
    for _, change in ipairs(changes) do
        pieces[#pieces + 1] = sub(text, done, change.from - 1)
        pieces[#pieces + 1] = change.text
        done = change.to + 1
    end
    pieces[#pieces + 1] = sub(text, done)
    return table.concat(pieces)
end

-- The first byte from `at` on, in steps of `by`, that is no space.
local function beside(text, at, by)
    while find(SPACES, sub(text, at, at), 1, true) do at = at + by end
    return at
end

-- Members that stand side by side go together, with the comma behind them; the last ones with the comma before them.
local function removals(text, fields)
    table.sort(fields, function(one, other) return one.key_from < other.key_from end)
    local changes, run = {}, nil
    for _, field in ipairs(fields) do
        if not (run and run.comma and beside(text, run.to + 1, 1) == field.key_from) then
            run = { from = field.key_from, text = "" }
            changes[#changes + 1] = run
        end
        local behind = beside(text, field.to + 1, 1)
        run.comma = sub(text, behind, behind) == ","
        run.to = run.comma and behind or field.to
    end
    local before = run and not run.comma and beside(text, run.from - 1, -1)
    if before and sub(text, before, before) == "," then run.from = before end
    return changes
end

local function with_namesakes(field, list)
    list[#list + 1] = field
    for _, earlier in ipairs(field.more or {}) do list[#list + 1] = earlier end
end

-- The order in which members are added must not change from one request to the next.
local function sorted_names(wishes)
    local names = {}
    for name in pairs(wishes) do names[#names + 1] = name end
    table.sort(names)
    return names
end

function scan.edit(text, fields, object, wishes)
    local removed, changes, added = {}, {}, {}
    for _, name in ipairs(sorted_names(wishes)) do
        local field, wish = fields[name], wishes[name]
        if field and wish then
            changes[#changes + 1] = { from = field.from, to = field.to, text = wish }
        elseif field then
            with_namesakes(field, removed)
        elseif wish then
            added[#added + 1] = '"' .. name .. '":' .. wish
        end
    end
    for _, change in ipairs(removals(text, removed)) do changes[#changes + 1] = change end
    if #added > 0 then
        local comma = object.members > #removed and "," or ""
        changes[#changes + 1] = { from = object.to, to = object.to - 1, text = comma .. table.concat(added, ",") }
    end
    return #changes > 0 and scan.splice(text, changes) or text
end

function scan.without(text, field)
    local fields = {}
    with_namesakes(field, fields)
    return scan.splice(text, removals(text, fields))
end

function scan.with(text, name, json)
    local to = beside(text, #text, -1)
    local last = beside(text, to - 1, -1)
    local comma = sub(text, last, last) == "{" and "" or ","
    return scan.splice(text, { { from = to, to = to - 1, text = comma .. '"' .. name .. '":' .. json } })
end

return scan
