-- The body of a request: what is asked for, and the body as vLLM may see it. It is never taken apart and put together again: what changes is spliced
-- into the text.
local cjson = require "cjson.safe"
local form = require "form"
local ring = require "ring"
local scan = require "scan"

local question = {}

-- How much of a long body is read before other requests get their turn.
local SLICE = 1024 * 1024

local WANTED = {
    model = true, priority = true, user = true, prompt_cache_key = true, messages = true, prompt = true, input = true,
    stream = true, stream_options = true,
}

local FORM = "multipart/form-data"

-- No name is longer, however it is written. Of what is, the beginning has to do as it stands: to decode some megabytes of escapes takes seconds.
local LONGEST = 4096

-- When the others had their last turn, and after how many seconds they get one.
local turn, TURN = 0, 0.005

-- A turn for the others, when they have waited long enough. Sleeping for 0 would be none: stock Nginx serves all timers that are due before it looks
-- at its connections again, and its clock stands still while it does.
local function pause()
    ngx.update_time()
    if ngx.now() - turn >= TURN then
        ngx.sleep(0.001)
        turn = ngx.now()
    end
end

local function read_file(name)
    local file = assert(io.open(name, "rb"))
    local parts = {}
    for part in function() return file:read(SLICE) end do
        table.insert(parts, part)
        pause()
    end
    file:close()
    return table.concat(parts)
end

local function read_text()
    ngx.req.read_body()
    local name = ngx.req.get_body_file()
    return name and read_file(name) or ngx.req.get_body_data() or ""
end

local function said(text, field)
    if field.to - field.from > LONGEST then
        return text:sub(field.from + 1, field.from + LONGEST)
    end
    return scan.string(text, field)
end

local function of_json(text)
    local fields, object = scan.scan(text, WANTED, pause)
    if not fields then
        return nil, { code = "invalid_json", message = "The body is not a JSON object: " .. object }
    end
    local model = fields.model and fields.model.type == "string" and said(text, fields.model) or nil
    return { text = text, fields = fields, object = object, model = model }
end

local function of_form(text, content_type)
    local at, why = form.field(text, content_type, "model", pause)
    if why then
        return nil, { code = "invalid_form", message = "The body is not a form that can be read: " .. why }
    end
    return { text = text, at = at, model = at and text:sub(at.from, at.to) }
end

-- Reads the body. Returns what it asks, with the `model`; or nothing and what is wrong.
function question.read()
    local text = read_text()
    local content_type = ngx.var.http_content_type or ""
    local asked, problem
    if content_type:sub(1, #FORM):lower() == FORM then
        asked, problem = of_form(text, content_type)
    else
        asked, problem = of_json(text)
    end
    if asked and not asked.model then
        return nil, { code = "missing_required_parameter", param = "model", message = "The body has no `model` that is a string." }
    end
    return asked, problem
end

local function text_of(asked, name)
    local field = asked.fields[name]
    return field and field.type == "string" and said(asked.text, field) or nil
end

local KEYS = {
    prefix = function(asked)
        return ring.prompt_key(asked.text, asked.fields)
    end,
    session = function(asked, route)
        local header = route.session_header and ngx.req.get_headers()[route.session_header]
        return type(header) == "string" and header or text_of(asked, "prompt_cache_key") or text_of(asked, "user")
    end,
}

-- What a request has in common with former ones that should go to the same backend, by the way in which its routes are balanced.
function question.keys(asked, routes)
    local keys
    for _, route in ipairs(routes) do
        if asked.fields and route.balance ~= "least" then
            keys = keys or {}
            keys[route.balance] = keys[route.balance] or KEYS[route.balance](asked, route)
        end
    end
    return keys
end

-- What has to change: vLLM knows the model by one name only, and a client must not say how urgent it is; and what else is wished.
local function edited(asked, model, wishes)
    if asked.at then
        return asked.model ~= model and form.splice(asked.text, { { from = asked.at.from, to = asked.at.to, text = model } }) or asked.text
    end
    if asked.model ~= model then
        wishes.model = cjson.encode(model)
    end
    if asked.fields.priority and not wishes.priority then
        wishes.priority = false
    end
    return next(wishes) and scan.edit(asked.text, asked.fields, asked.object, wishes) or asked.text
end

-- Makes the body one for this model. `wishes` are as scan.edit takes them.
function question.put(asked, model, wishes)
    local text = edited(asked, model, wishes)
    if text ~= asked.text then
        if #text > SLICE then
            pause()
        end
        ngx.req.set_body_data(text)
    end
end

return question
