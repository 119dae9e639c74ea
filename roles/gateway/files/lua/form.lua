-- Finds a field of a form (multipart/form-data), in which clients send sounds, without taking the form apart.
--
-- What the server behind (python-multipart) might understand otherwise is refused, not guessed at: a field that comes twice or as a file, names
-- that are encoded, anything before the first boundary and behind the last.
--
--   field(body, content_type, name, pause)  {from, to}: positions of the first and last byte of its value; nil when there is none;
--                                           nil and why when it is no such form. pause() is called after each STRETCH of bytes
--   splice(body, changes)                   see scan.splice
local ffi = require "ffi"
local scan = require "scan"

ffi.cdef "void *memmem(const void *haystack, size_t length, const void *needle, size_t needle_length);"

local find, sub = string.find, string.sub

-- Starlette's limit of parts.
local form = { STRETCH = 1048576, HEADERS = 8192, PARTS = 1000, splice = scan.splice }

local TOKEN = "[%w!#$%%&'*+.^_`|~-]+"

-- Calls take(name, value) with the parameters of a header, from `at` on. Whether all of it was understood.
local function parameters(text, at, take)
    while at <= #text do
        local _, behind, name = find(text, "^%s*;%s*(" .. TOKEN .. ")=", at)
        if not behind then
            return find(text, "^%s*$", at) ~= nil
        end
        local quoted, after, value = find(text, '^"([^"]*)"', behind + 1)
        if not quoted then
            quoted, after, value = find(text, "^(" .. TOKEN .. ")", behind + 1)
        end
        if not quoted or not take(name:lower(), value) then
            return false
        end
        at = after + 1
    end
    return true
end

-- The boundary between the parts, by the header Content-Type.
local function boundary_of(content_type)
    local _, at = find(content_type:lower(), "^%s*multipart/form%-data")
    local boundary
    local good = at and parameters(content_type, at + 1, function(name, value)
        if name == "boundary" and not boundary and #value <= 70 and find(value, "^[%w'()+_,./:=?-]+$") then
            boundary = value
            return true
        end
        return name == "charset" and value:lower() == "utf-8"
    end)
    return good and boundary
end

-- The name in a Content-Disposition, and whether a file is said to come. An escaped quote is where readers differ.
local function disposition(value)
    local _, at = find(value:lower(), "^%s*form%-data")
    local name, file
    local good = at and not find(value, '\\[\\"]') and parameters(value, at + 1, function(key, said)
        if key == "name" then
            local first = not name
            name = said
            return first and not find(said, "\\", 1, true)
        end
        file = file or find(key, "^filename") ~= nil
        return not find(key, "^name")
    end)
    return good and name, file
end

-- What the headers of a part say of its name; nil when they are not understood.
local function named(headers)
    local name, file
    for line in (headers .. "\r\n"):gmatch "(.-)\r\n" do
        local key, value = line:match("^(" .. TOKEN .. "):([^%c]*)$")
        if not key then
            return nil
        elseif key:lower() == "content-disposition" then
            if name then
                return nil
            end
            name, file = disposition(value)
        end
    end
    return name, file
end

-- Finds what ends a part, a stretch at a time.
local function find_next(walk, at)
    while at + #walk.delimiter - 1 <= #walk.body do
        local size = math.min(#walk.body - at + 1, form.STRETCH + #walk.delimiter)
        local begin = walk.bytes + at - 1
        local hit = ffi.C.memmem(begin, size, walk.delimiter, #walk.delimiter)
        if hit ~= nil then
            return at + tonumber(ffi.cast("const uint8_t *", hit) - begin)
        end
        at = at + form.STRETCH
        walk.pause()
    end
end

-- One part, from its headers on: whether it was understood. Notes where the next one begins, nil behind the last, and the field if it is this one.
local function part(walk)
    local _, end_of_headers = find(sub(walk.body, walk.at, walk.at + form.HEADERS), "\r\n\r\n", 1, true)
    local name, file = named(end_of_headers and sub(walk.body, walk.at, walk.at + end_of_headers - 5) or "")
    local from = walk.at + (end_of_headers or 0)
    local next_one = name and find_next(walk, from)
    if not next_one then
        return false
    elseif name == walk.name then
        if walk.field or file then
            return false
        end
        walk.field = { from = from, to = next_one - 1 }
    end
    local behind = next_one + #walk.delimiter
    local mark = sub(walk.body, behind, behind + 1)
    walk.at = mark == "\r\n" and behind + 2 or nil
    return walk.at ~= nil or mark == "--" and find(sub(walk.body, behind + 2, behind + 4), "^\r?\n?$") ~= nil
end

function form.field(body, content_type, name, pause)
    local boundary = boundary_of(content_type)
    if not boundary then
        return nil, "its Content-Type has no plain boundary"
    end
    local first = "--" .. boundary .. "\r\n"
    if sub(body, 1, #first) ~= first then
        return nil, "it does not begin with its boundary"
    end
    local walk = {
        body = body, bytes = ffi.cast("const uint8_t *", body), delimiter = "\r\n--" .. boundary, at = #first + 1, name = name,
        pause = pause or function() end,
    }
    for number = 1, form.PARTS do
        if not part(walk) then
            return nil, "part " .. number .. " is not understood"
        elseif not walk.at then
            return walk.field
        end
    end
    return nil, "it has more than " .. form.PARTS .. " parts"
end

return form
