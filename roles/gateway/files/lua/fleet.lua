-- What the inventory says, as this gateway was told: backends, routes, clients and the hashes of their keys. Read once for each configuration, by
-- the master process; what is wrong there is an error, so that the former configuration stays in use.
local cjson = require "cjson.safe"
local sha256 = require "nginx.sha256"
local string_of = require "nginx.string"

local fleet = {}

-- JSON's null is a value in cjson, and a true one.
local function without_nulls(value)
    if type(value) == "table" then
        for name, member in pairs(value) do
            value[name] = without_nulls(member)
        end
    elseif value == cjson.null then
        return nil
    end
    return value
end

local function set_of(names)
    if not names then
        return nil
    end
    local set = {}
    for _, name in ipairs(names) do
        set[name] = true
    end
    return set
end

local function hash(text)
    local digest = sha256:new()
    digest:update(text)
    return string_of.to_hex(digest:final())
end

local function read(path)
    local file = assert(io.open(path, "rb"))
    local text = file:read("*a")
    file:close()
    return text
end

-- A backend as Nginx takes it.
local function reachable(id, backend)
    backend.id = id
    if backend.address:find(":", 1, true) then
        backend.address = "[" .. backend.address .. "]"
    end
    return backend
end

-- The entries of `routes` by every name that a request can give, and the paths that any of them takes.
local function index_routes(routes, backends)
    local models, paths = {}, {}
    for number, route in ipairs(routes) do
        route.number = number
        route.clients, route.takes = set_of(route.clients), set_of(route.paths)
        for position, id in ipairs(route.backends) do
            route.backends[position] = assert(backends[id], "a route names the backend " .. id .. ", which is not there")
        end
        for path in pairs(route.takes) do
            paths[path] = true
        end
        for _, name in ipairs({ route.model, unpack(route.aliases) }) do
            models[name] = models[name] or {}
            table.insert(models[name], route)
        end
    end
    return models, paths
end

-- Reads the data and the internal key, which have to belong together.
function fleet.load(data_file, key_file)
    local text = read(data_file)
    local data = assert(cjson.decode(text), data_file .. " is not JSON")
    assert(data.version == 1, data_file .. " is of another version of the program")
    data = without_nulls(data)
    local key = read(key_file):gsub("%s+$", "")
    assert(hash(key) == data.internal_key_sha256, key_file .. " does not belong to " .. data_file)

    fleet.id, fleet.gateway = hash(text):sub(1, 12), data.gateway
    fleet.settings, fleet.keys, fleet.clients, fleet.routes = data.settings, data.keys, data.clients, data.routes
    fleet.authorization = "Bearer " .. key
    fleet.backends = {}
    for id, backend in pairs(data.backends) do
        fleet.backends[id] = reachable(id, backend)
    end
    fleet.models, fleet.paths = index_routes(data.routes, fleet.backends)
    for name, client in pairs(fleet.clients) do
        client.name, client.models, client.routes = name, set_of(client.models), {}
    end
    fleet.loaded = ngx.time()
end

-- Those of the keys that came: their hashes need not be made again.
local of_key = {}

-- The client that a key belongs to.
function fleet.client_of(key, now)
    local entry = of_key[key]
    if not entry then
        entry = fleet.keys[hash(key)]
        if not entry then
            return nil
        end
        of_key[key] = entry
    end
    if entry.expires and now >= entry.expires then
        return nil
    end
    return fleet.clients[entry.client]
end

local function may(client, route)
    return (not route.clients or route.clients[client.name]) and (not client.models or client.models[route.model])
end

-- The routes to what a client asks for by this name: none, too, when it may not use them. What was found is kept, for names that there are.
function fleet.routes_of(client, name)
    local found = client.routes[name]
    if found then
        return found
    end
    found = {}
    for _, route in ipairs(fleet.models[name] or found) do
        if may(client, route) then
            found[#found + 1] = route
        end
    end
    if #found > 0 then
        client.routes[name] = found
    end
    return found
end

-- Those of the routes that take a path; mostly all.
function fleet.taking(routes, path)
    local found
    for position, route in ipairs(routes) do
        if found and route.takes[path] then
            found[#found + 1] = route
        elseif not found and not route.takes[path] then
            found = { unpack(routes, 1, position - 1) }
        end
    end
    return found or routes
end

-- The models that a client may use, in the order of the inventory.
function fleet.models_of(client)
    local names, seen = {}, {}
    for _, route in ipairs(fleet.routes) do
        if not seen[route.model] and may(client, route) then
            seen[route.model] = true
            table.insert(names, route.model)
        end
    end
    return names
end

return fleet
