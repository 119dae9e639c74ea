-- Sends requests that begin alike to the same backend, which still has what it computed for the last one: a consistent hash with bounded load.
--
-- Each name stands at many places of a ring; a key belongs to the name that comes next on it. When a name comes or goes, only the keys at its places
-- move. A name with more than `factor` times its share of the load is passed over, so that a favourite prompt does not crush its backend.
--
--   new(names, replicas)                   a ring. The same names in any order make the same ring
--   order(ring, key)                       all names, in the order in which they would get this key; also ring:order(key)
--   pick(ring, key, load, factor)          the first of them that has room by its load(name), which is nil for one that cannot be used; where none
--                                          has room, the one with the least load; nil when none can be used
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
    return setmetatable({ points = points, names = { unpack(names) } }, ring)
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

-- Walks the names in the order in which they would get this key, each once, until see(name) returns true.
local function walk(self, key, see)
    local points, seen, left = self.points, {}, #self.names
    local at = first_from(points, hash(key))
    while left > 0 do
        local point = points[(at - 1) % #points + 1]
        if not seen[point.name] then
            seen[point.name] = true
            left = left - 1
            if see(point.name) then
                return
            end
        end
        at = at + 1
    end
end

function ring:order(key)
    local names = {}
    walk(self, key, function(name)
        names[#names + 1] = name
    end)
    return names
end

-- The loads of those that can be used, of how many, and of all together.
local function loads(self, load)
    local found, count, sum = {}, 0, 0
    for _, name in ipairs(self.names) do
        found[name] = load(name)
        if found[name] then
            count, sum = count + 1, sum + found[name]
        end
    end
    return found, count, sum
end

function ring.pick(self, key, load, factor)
    local found, count, sum = loads(self, load)
    local most = math.ceil((factor or FACTOR) * (sum + 1) / count)
    local picked
    walk(self, key, function(name)
        local its = found[name]
        if its and (not picked or its < most or its < found[picked]) then
            picked = name
        end
        return its and its < most
    end)
    return picked
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
