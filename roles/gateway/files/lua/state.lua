-- What changes without a reload: which backends are used, and how much each has to do. It lies in a dictionary that all workers share, those of
-- former configurations included.
local cjson = require "cjson.safe"
local fleet = require "fleet"
local keys = require "keys"

local state = {}

-- A failure counts as this many requests in flight, for this many seconds: who fails fast would have the fewest otherwise.
local FAILURE_LOAD = 4
local FAILURE_SECONDS = 10
-- What the checks know the end of: the certificate that clients see, and the one of the fleet, which hosts see.
state.CERTIFICATES = { "tls", "fleet" }

local shared = ngx.shared.gateway_state
local file_name
local last_text

-- What this worker has read of the state, and which one it was: most requests find it unchanged.
local used, tls, shares, known = {}, {}, nil, nil

local all_key, failed_key = keys("in:"), keys("failed:")
-- Of what this worker has in flight.
local own_key

function state.in_flight_of(id)
    return shared:get(all_key[id]) or 0
end

local function changed()
    shared:incr("changes", 1, 0)
end

-- Takes up what the checks service wrote. A backend that it does not name is not used.
local function adopt(text)
    local told = cjson.decode(text)
    if type(told) ~= "table" or type(told.backends) ~= "table" then
        ngx.log(ngx.ERR, file_name, " is no state; the last one stays in use")
        return
    end
    for id in pairs(fleet.backends) do
        local backend = told.backends[id] or {}
        local use = backend.use == true
        if use and not shared:get("use:" .. id) then
            -- who comes back begins anew
            shared:delete(failed_key[id])
        end
        shared:set("use:" .. id, use)
        shared:set("tls:" .. id, backend.tls)
        shared:set("leaving:" .. id, backend.leaving == true)
        shared:set("share:" .. id, tonumber(backend.share) or 1)
    end
    shared:set("time", tonumber(told.time) or 0)
    for _, name in ipairs(state.CERTIFICATES) do
        shared:set("not_after:" .. name, tonumber((told.certificates or {})[name]))
    end
    changed()
    shared:set("serial", tonumber(told.serial) or 0)
end

-- Looks whether there is a new state. Where none was ever written, since the host started, every backend is used.
function state.read()
    local file = io.open(file_name, "rb")
    if not file then
        if shared:get("serial") == nil then
            for id in pairs(fleet.backends) do
                shared:set("use:" .. id, true)
            end
            changed()
        end
        return
    end
    local text = file:read("*a")
    file:close()
    if text ~= last_text then
        last_text = text
        adopt(text)
    end
end

-- The backends of this configuration, and those of former ones that old workers still have requests of.
local function served()
    local ids = {}
    for id in (shared:get("served") or ""):gmatch("[^\n]+") do
        ids[id] = state.in_flight_of(id) > 0 or nil
    end
    for id in pairs(fleet.backends) do
        ids[id] = true
    end
    return ids
end

local function remember_served()
    local list = {}
    for id in pairs(served()) do
        list[#list + 1] = id
    end
    shared:set("served", table.concat(list, "\n"))
end

function state.load(name)
    file_name, last_text, known = name, nil, nil
    remember_served()
    state.read()
end

-- The backends that are used, as a set of ids; whether any has failed lately; and those that get a share of the requests only, with it, or nothing
-- where there are none. What it returns is so at this moment: to be asked for each request.
function state.look()
    local changes = shared:get("changes")
    if changes ~= known then
        known, shares = changes, nil
        for id, backend in pairs(fleet.backends) do
            used[id] = shared:get("use:" .. id) == true
            -- as the checks say, or as the inventory has it where they never said anything
            local told = shared:get("tls:" .. id)
            tls[id] = told == true or told == nil and backend.tls == true
            local share = shared:get("share:" .. id) or 1
            if share < 1 then
                shares = shares or {}
                shares[id] = share
            end
        end
    end
    return used, shared:get("failing") == true, shares
end

function state.used(id)
    return state.look()[id]
end

-- Whether a backend speaks TLS, by the last look: a request asks it of the backend that it has just been given.
function state.speaks_tls(id)
    return tls[id]
end

function state.leaving(id)
    return shared:get("leaving:" .. id) == true
end

-- What the failures of a backend count for.
function state.failures_of(id)
    return FAILURE_LOAD * (shared:get(failed_key[id]) or 0)
end

function state.failed(id)
    shared:incr(failed_key[id], 1, 0, FAILURE_SECONDS)
    shared:set("failing", true, FAILURE_SECONDS)
end

-- Each worker counts under its process id as well, so that what a killed one had can be given back. Returns how many the backend has with it.
function state.enter(id)
    shared:incr(own_key[id], 1, 0)
    return shared:incr(all_key[id], 1, 0) or 0
end

function state.leave(id)
    shared:incr(all_key[id], -1, 0)
    shared:incr(own_key[id], -1, 0)
end

-- Makes this worker one whose counts are looked after.
function state.begin()
    own_key = keys("in:", ":" .. ngx.worker.pid())
    shared:rpush("owners", ngx.worker.pid())
end

-- Whether a process is there, and one of Nginx's.
local function alive(pid)
    local file = io.open("/proc/" .. pid .. "/comm", "rb")
    if not file then
        return false
    end
    local name = file:read("*l")
    file:close()
    return name == "nginx"
end

local function give_back(pid)
    for id in pairs(served()) do
        local key = "in:" .. id .. ":" .. pid
        local count = shared:get(key)
        if count then
            shared:incr("in:" .. id, -count)
            shared:delete(key)
        end
    end
end

-- Gives back what workers had that are gone. Returns the test for others who count by process.
function state.sweep()
    for _ = 1, shared:llen("owners") or 0 do
        local pid = shared:lpop("owners")
        if pid and alive(pid) then
            shared:rpush("owners", pid)
        elseif pid then
            give_back(pid)
        end
    end
    return alive
end

-- The state as it was written, with the reasons, which are of no use to requests. Nothing when there is none.
function state.told()
    local file = io.open(file_name, "rb")
    local told = file and cjson.decode(file:read("*a"))
    if file then
        file:close()
    end
    return type(told) == "table" and type(told.backends) == "table" and told or nil
end

-- For how long the checks have written nothing.
function state.age()
    local time = shared:get("time")
    return time and math.max(0, ngx.now() - time)
end

-- When a certificate ends, in unix seconds.
function state.not_after(certificate)
    return shared:get("not_after:" .. certificate)
end

-- How many workers there are, and how many of them belong to former configurations.
function state.workers()
    local all = shared:llen("owners") or 0
    return { all = all, old = math.max(0, all - ngx.worker.count()) }
end

-- For the checks service.
function state.in_flight()
    local counts = {}
    for id in pairs(served()) do
        counts[id] = state.in_flight_of(id)
    end
    return { serial = shared:get("serial") or 0, in_flight = counts }
end

return state
