-- A dictionary as ngx.shared has them, with a clock of its own (`now`), room for `most` keys, and before() called before each operation.
local Shared = {}
Shared.__index = Shared

local function new()
    return setmetatable({ values = {}, expiry = {}, now = 0, before = function() end }, Shared)
end

local function expires(self, seconds)
    return seconds and seconds > 0 and self.now + seconds or nil
end

function Shared:peek(key)
    local expiry = self.expiry[key]
    if expiry and expiry <= self.now then
        self.values[key], self.expiry[key] = nil, nil
    end
    return self.values[key]
end

function Shared:put(key, value, seconds)
    assert(type(key) == "string" and #key > 0 and #key < 65536)
    assert(value == nil or ({ string = true, number = true, boolean = true })[type(value)], "no such value in a dictionary")
    assert(not seconds or seconds >= 0, "a negative expiry is an error")
    self.values[key], self.expiry[key] = value, expires(self, seconds)
    return true
end

function Shared:get(key)
    self.before()
    return self:peek(key)
end

function Shared:set(key, value, seconds)
    self.before()
    return self:put(key, value, seconds)
end

function Shared:add(key, value, seconds)
    self.before()
    if self:peek(key) ~= nil then
        return false, "exists"
    end
    return self:put(key, value, seconds)
end

function Shared:full()
    local count = 0
    for key in pairs(self.values) do
        count = count + (self:peek(key) ~= nil and 1 or 0)
    end
    return self.most ~= nil and count >= self.most
end

function Shared:safe_set(key, value, seconds)
    self.before()
    if self:peek(key) == nil and self:full() then
        return nil, "no memory"
    end
    return self:put(key, value, seconds)
end

function Shared:safe_add(key, value, seconds)
    self.before()
    if self:peek(key) ~= nil then
        return false, "exists"
    elseif self:full() then
        return nil, "no memory"
    end
    return self:put(key, value, seconds)
end

function Shared:delete(key)
    self.before()
    self.values[key], self.expiry[key] = nil, nil
end

function Shared:incr(key, count, init, seconds)
    self.before()
    local value = self:peek(key)
    if value == nil then
        if not init then
            return nil, "not found"
        end
        self:put(key, init + count, seconds)
        return init + count
    elseif type(value) ~= "number" then
        return nil, "not a number"
    end
    self.values[key] = value + count
    return value + count
end

return new
