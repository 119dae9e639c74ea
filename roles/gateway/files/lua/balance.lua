-- Which backend a request goes to.
local ring = require "ring"
local state = require "state"

local balance = {}

-- Whether a backend may be asked: it is used, has not just failed this request, and takes one more.
local function usable(backend, avoided)
    return backend ~= avoided and state.used(backend.id)
        and (not backend.most_requests or state.in_flight_of(backend.id) < backend.most_requests)
end

local function any_usable(route, avoided)
    for _, backend in ipairs(route.backends) do
        if usable(backend, avoided) then
            return true
        end
    end
    return false
end

-- Routes of one model share it by their weights; those without a backend give their share to the others.
local function drawn(routes, avoided)
    local choices, sum = {}, 0
    for _, route in ipairs(routes) do
        if any_usable(route, avoided) then
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
local function least(route, avoided)
    local best, best_load, equals
    for _, backend in ipairs(route.backends) do
        if usable(backend, avoided) then
            local load = state.load_of(backend.id)
            if not best or load < best_load then
                best, best_load, equals = backend, load, 1
            elseif load == best_load then
                equals = equals + 1
                if math.random(equals) == 1 then
                    best = backend
                end
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
local function same(route, key, avoided)
    local of_route = ring_of(route)
    local id = ring.pick(of_route, key, state.load_of, function(name)
        return usable(route.by_id[name], avoided)
    end)
    return route.by_id[id]
end

-- A route and a backend for a request, or nothing when none can take it. `keys` has what the request has in common with former ones, by the way in
-- which a route is balanced.
function balance.pick(routes, keys, avoided)
    local route = #routes == 1 and routes[1] or drawn(routes, avoided)
    if not route then
        return nil
    end
    local key = keys and keys[route.balance]
    return route, key and same(route, key, avoided) or least(route, avoided)
end

-- Whether there is a backend that could take requests, were it not full.
function balance.full(routes)
    for _, route in ipairs(routes) do
        for _, backend in ipairs(route.backends) do
            if state.used(backend.id) then
                return true
            end
        end
    end
    return false
end

return balance
