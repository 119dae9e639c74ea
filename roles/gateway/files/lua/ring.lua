-- Sends requests that begin alike to the same backend, which still has what it computed for the last one: a consistent hash with bounded load.
--
-- Each name stands at many places of a ring; a key belongs to the name that comes next on it. When a name comes or goes, only the keys at its places
-- move. A name with more than `factor` times its share of the load is passed over, so that a favourite prompt does not crush its backend.
--
--   new(names, replicas)                   a ring. The same names in any order make the same ring
--   order(ring, key)                       all names, in the order in which they would get this key; also ring:order(key)
--   pick(ring, key, load, usable, factor)  the first of them that is usable(name) and has room by its load(name); where none has, the one with
--                                          the least load; nil when none is usable
--   prompt_key(text, fields, bytes)        what requests with one beginning have in common: the model and the first bytes of the prompt, by the
--                                          fields that scan found (model, and messages, prompt or input); nil without a prompt
local bit = require "bit"

local bxor, rshift = bit.bxor, bit.rshift

local ring = {}
ring.__index = ring

local REPLICAS, FACTOR, BYTES = 100, 1.25, 4096
local PROMPTS = { "messages", "prompt", "input" }

-- FNV-1a, then a step of MurmurHash3, which spreads short texts that are nearly the same. The upper half is a number of Lua.
local function hash(text)
    local value = 14695981039346656037ULL
    for index = 1, #text do
        value = bxor(value, text:byte(index)) * 1099511628211ULL
    end
    value = bxor(value, rshift(value, 33)) * 0xff51afd7ed558ccdULL
    return tonumber(rshift(value, 32))
end

function ring.new(names, replicas)
    local points = {}
    for _, name in ipairs(names) do
        for replica = 1, replicas or REPLICAS do
            points[#points + 1] = { at = hash(name .. "#" .. replica), name = name }
        end
    end
    table.sort(points, function(one, other)
        return one.at < other.at or one.at == other.at and one.name < other.name
    end)
    return setmetatable({ points = points, count = #names }, ring)
end

-- The first point that is not before `at`; behind the last one comes the first.
local function first_from(points, at)
    local low, high = 1, #points + 1
    while low < high do
        local middle = math.floor((low + high) / 2)
        if points[middle].at < at then
            low = middle + 1
        else
            high = middle
        end
    end
    return low
end

function ring:order(key)
    local points, names, seen = self.points, {}, {}
    local start = first_from(points, hash(key))
    for step = 0, #points - 1 do
        local name = points[(start + step - 1) % #points + 1].name
        if not seen[name] then
            seen[name] = true
            names[#names + 1] = name
            if #names == self.count then
                break
            end
        end
    end
    return names
end

-- The usable names in their order, with the load of each and of all.
local function loads(self, key, load, usable)
    local names, found, sum = {}, {}, 0
    for _, name in ipairs(self:order(key)) do
        if usable(name) then
            names[#names + 1] = name
            found[name] = load(name)
            sum = sum + found[name]
        end
    end
    return names, found, sum
end

function ring.pick(self, key, load, usable, factor)
    local names, found, sum = loads(self, key, load, usable)
    local most = math.ceil((factor or FACTOR) * (sum + 1) / #names)
    local least = names[1]
    for _, name in ipairs(names) do
        if found[name] < most then
            return name
        elseif found[name] < found[least] then
            least = name
        end
    end
    return least
end

-- The key of a prompt.

-- A conversation keeps its backend while it grows: what counts of it is what comes before the first answer.
local function beginning(text)
    local answer = text:find('"role"%s*:%s*"assistant"')
    local asked = answer and text:sub(1, answer - 1) or text
    return (asked:gsub("[%s,{}%]]+$", ""))
end

function ring.prompt_key(text, fields, bytes)
    for _, name in ipairs(PROMPTS) do
        local field = fields[name]
        if field then
            local model = fields.model and text:sub(fields.model.from, fields.model.to) or ""
            local to = math.min(field.to, field.from + (bytes or BYTES) - 1)
            return model .. beginning(text:sub(field.from, to))
        end
    end
end

return ring
