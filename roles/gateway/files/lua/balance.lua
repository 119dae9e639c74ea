-- Which backend a request goes to.
local ring = require "ring"
local state = require "state"

local balance = {}

-- How much a backend has to do. Nothing when it may not be asked: it is not used, has just failed this request, or takes no more.
-- `moment` is what all of a request's choices go by: used, failing, avoided, spared.
local function load_of(backend, moment)
    if not moment.used[backend.id] or backend == moment.avoided or moment.spared and moment.spared[backend.id] then
        return nil
    end
    local running = state.in_flight_of(backend.id)
    if backend.most_requests and running >= backend.most_requests then
        return nil
    end
    return moment.failing and running + state.failures_of(backend.id) or running
end

local function any_usable(route, moment)
    for _, backend in ipairs(route.backends) do
        if load_of(backend, moment) then
            return true
        end
    end
    return false
end

-- Routes of one model share it by their weights; those without a backend give their share to the others.
local function drawn(routes, moment)
    local choices, sum = {}, 0
    for _, route in ipairs(routes) do
        if any_usable(route, moment) then
            choices[#choices + 1] = route
            sum = sum + route.weight
        end
    end
    local point = math.random() * sum
    for _, route in ipairs(choices) do
        point = point - route.weight
        if point < 0 then
            return route
        end
    end
end

-- The one with the least to do; among equals, one at random.
local function least(route, moment)
    local best, best_load, equals
    for _, backend in ipairs(route.backends) do
        local load = load_of(backend, moment)
        if load and (not best or load < best_load) then
            best, best_load, equals = backend, load, 1
        elseif load and load == best_load then
            equals = equals + 1
            if math.random(equals) == 1 then
                best = backend
            end
        end
    end
    return best
end

-- A ring of the backends of a route, made when it is first needed.
local function ring_of(route)
    if not route.ring then
        local names = {}
        route.by_id = {}
        for position, backend in ipairs(route.backends) do
            names[position], route.by_id[backend.id] = backend.id, backend
        end
        route.ring = ring.new(names)
    end
    return route.ring
end

-- The one that had this key before, unless it has too much to do.
local function same(route, key, moment)
    local of_route = ring_of(route)
    local id = ring.pick(of_route, key, function(name)
        return load_of(route.by_id[name], moment)
    end)
    return route.by_id[id]
end

-- Which of those that get a share only do not get this request. Nothing where there are none.
local function spared_of(shares)
    local spared
    for id, share in pairs(shares) do
        if math.random() >= share then
            spared = spared or {}
            spared[id] = true
        end
    end
    return spared
end

local function pick(routes, keys, moment)
    local route = #routes == 1 and routes[1] or drawn(routes, moment)
    if not route then
        return nil
    end
    local key = keys and keys[route.balance]
    return route, key and same(route, key, moment) or least(route, moment)
end

-- A route and a backend for a request, or nothing when none can take it. `keys` has what the request has in common with former ones, by the way in
-- which a route is balanced.
function balance.pick(routes, keys, avoided)
    local used, failing, shares = state.look()
    local moment = { used = used, failing = failing, avoided = avoided, spared = shares and spared_of(shares) }
    local route, backend = pick(routes, keys, moment)
    if not backend and moment.spared then
        -- nobody else takes it
        moment.spared = nil
        return pick(routes, keys, moment)
    end
    return route, backend
end

-- Whether there is a backend that could take requests, were it not full.
function balance.full(routes)
    local used = state.look()
    for _, route in ipairs(routes) do
        for _, backend in ipairs(route.backends) do
            if used[backend.id] then
                return true
            end
        end
    end
    return false
end

return balance
