-- Which backend a request goes to.
local state = require "state"

local balance = {}

-- The backends of a route that are used now, without one that has just failed.
local function usable(route, avoided)
    local found = {}
    for _, backend in ipairs(route.backends) do
        if backend ~= avoided and state.used(backend.id) then
            table.insert(found, backend)
        end
    end
    return found
end

-- One of the choices, by their weights.
local function drawn(choices)
    local sum = 0
    for _, choice in ipairs(choices) do
        sum = sum + choice.route.weight
    end
    local point = math.random() * sum
    for _, choice in ipairs(choices) do
        point = point - choice.route.weight
        if point < 0 then
            return choice
        end
    end
    return choices[#choices]
end

-- The one with the least to do; among equals, one at random.
local function least(backends)
    local best, best_load, equals
    for _, backend in ipairs(backends) do
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
    return best
end

-- A route and a backend for a request, or nothing when none is used now. Routes of one model share it by their weights.
function balance.pick(routes, avoided)
    local choices = {}
    for _, route in ipairs(routes) do
        local backends = usable(route, avoided)
        if #backends > 0 and route.weight > 0 then
            table.insert(choices, { route = route, backends = backends })
        end
    end
    if #choices == 0 then
        return nil
    end
    local choice = #choices == 1 and choices[1] or drawn(choices)
    return choice.route, least(choice.backends)
end

return balance
