-- A request from its beginning to its end. nginx.conf calls the functions in the order in which they stand here.
local account = require "account"
local answer = require "answer"
local balance = require "balance"
local balancer = require "ngx.balancer"
local budgets = require "budgets"
local cjson = require "cjson.safe"
local cors = require "cors"
local fleet = require "fleet"
local limit = require "limit"
local question = require "question"
local state = require "state"

local gateway = {}

local MODELS = "/v1/models"
-- Seconds after which a client may try again when no backend was there, or all were full.
local RETRY_AFTER = 2
-- The status of what is no HTTP. Nginx takes it for an answer of HTTP 0.9 and would send it on without a header; there is no way back from there.
local NO_HTTP = 9

local limits = ngx.shared.gateway_limits
local settings
-- The requests of this worker by their id. Nginx forgets ngx.ctx when it goes from one location to another, but never the id.
local running = {}

local function current()
    local context = ngx.ctx
    if not context.request then
        context.request = running[ngx.var.request_id]
    end
    return context.request
end

-- init_by_lua: `told` names the files, and what of nginx.conf the program has to know.
function gateway.load(told)
    settings = told
    fleet.load(told.fleet, told.internal_key)
    cors.load(fleet.settings.cors_origins)
    state.load(told.state)
    budgets.load(told.budgets)
    require("status").load(told.page, told.program)
end

-- How far memory may grow before what is no longer used is looked for, in percent of what was: requests leave much, and little of it stays.
local GARBAGE_PAUSE = 300

-- init_worker_by_lua
function gateway.start()
    collectgarbage("setpause", GARBAGE_PAUSE)
    math.randomseed(ngx.worker.pid() + ngx.now() * 1000)
    state.begin()
    if ngx.worker.id() == 0 then
        ngx.timer.every(0.2, function() state.read() end)
        ngx.timer.every(1, function()
            limit.sweep(limits, state.sweep())
        end)
        ngx.timer.every(10, function()
            budgets.save(function() ngx.sleep(0.001) end)
        end)
    end
end

-- exit_worker_by_lua
function gateway.stop()
    budgets.save()
end

-- The key that a client sent, whatever the header its library puts it into.
local function key_of(variables)
    local authorization = variables.http_authorization
    if authorization and authorization:sub(1, 7):lower() == "bearer " then
        return authorization:sub(8)
    end
    return variables.http_x_api_key or variables.http_api_key
end

-- The methods of a path; nil when it is not let through. Nobody but the gateway itself answers for the models.
local function methods_of(path)
    if fleet.paths[path] then
        return "POST"
    elseif path == MODELS or path:sub(1, #MODELS + 1) == MODELS .. "/" then
        return "GET, HEAD"
    end
end

local function takes(methods, method)
    return method == methods or methods ~= "POST" and (method == "GET" or method == "HEAD")
end

-- A request, with everything that the program comes to know of it: a table that has its names from the beginning need not grow.
local function new_request(id, path)
    return {
        id = id, path = path,
        -- what it asks: a browser beforehand, or a client a model; and what is said to it when it is refused, or its backend failed
        asked_beforehand = false, client = false, asked = false, refusal = false, told = false, error_parts = false,
        -- where it may go and where it went; running: it counts there, entered: since when it counts at its client
        routes = false, keys = false, route = false, backend = false, failed = false, running = false, entered = false,
        -- of account.lua: what is left to the client, what the question has and the answer tells
        rate = false, tokens = false, bytes = false, ours = false, stream = false, whole = false, first = false,
    }
end

-- Rewrite phase: the path, the key and the method. This is before the limits, so what is refused here uses up nobody's share.
function gateway.admit()
    local variables = ngx.var
    local request = new_request(variables.request_id, variables.uri)
    running[request.id] = request
    ngx.ctx.request = request
    local methods = methods_of(request.path)
    if not methods then
        return answer.refuse(request, 404)
    end
    local method = ngx.req.get_method()
    if cors.asks_beforehand(method, variables) then
        request.asked_beforehand = methods
        return ngx.exit(204)
    elseif settings.client_certificates and variables.ssl_client_verify ~= "SUCCESS" then
        return answer.refuse(request, 400, { reason = 496 })
    end
    local key = key_of(variables)
    request.client = key and fleet.client_of(key, ngx.time())
    if not request.client then
        return answer.refuse(request, 401)
    elseif not takes(methods, method) then
        return answer.refuse(request, 405, { allow = methods })
    end
end

-- The limits of a client.
local function count(request)
    local client = request.client
    local within, left, seconds = limit.rate(limits, client.name, client.requests_per_minute, client.burst + 1, ngx.now())
    if not within then
        account.limited(request, "requests_per_minute")
        return answer.refuse(request, 429, { retry_after = math.ceil(left) })
    end
    request.rate = { limit = client.requests_per_minute, left = left, reset = limit.duration(seconds) }
end

local function enter(request)
    local client = request.client
    local free, seconds = limit.enter(limits, client.name, ngx.worker.pid(), client.concurrent_requests)
    if not free then
        account.limited(request, "concurrent_requests")
        return answer.refuse(request, 429, {
            retry_after = math.max(1, math.ceil(seconds)),
            message = "Too many requests at once. Wait until one of them has ended.",
        })
    end
    request.entered = ngx.now()
end

-- A name as it can be said again: not too long, and UTF-8, which is all that JSON can hold.
local function said_again(name)
    if #name > 200 then
        -- the last character may have lost its end
        name = name:sub(1, 200):gsub("[\192-\255]?[\128-\191]*$", "")
    end
    return ngx.re.find(name, "", "u") and name or "?"
end

-- Whether a model is not there or not for this client is the same to it.
local function refuse_model(request, name)
    return answer.refuse(request, 404, {
        code = "model_not_found",
        param = "model",
        message = "The model `" .. said_again(name) .. "` does not exist or you do not have access to it.",
    })
end

local function list_models(request)
    local name = request.path:sub(#MODELS + 2):gsub("/$", "")
    if name == "" then
        return answer.models(fleet.models_of(request.client), fleet.loaded)
    end
    local route = fleet.routes_of(request.client, name)[1]
    if not route then
        return refuse_model(request, name)
    end
    return answer.model(route.model, fleet.loaded)
end

local function read(request)
    local asked, problem = question.read()
    if not asked then
        return answer.refuse(request, 400, problem)
    end
    request.asked = asked
end

local function find_routes(request)
    local name = request.asked.model
    local routes = fleet.routes_of(request.client, name)
    if #routes == 0 then
        return refuse_model(request, name)
    end
    request.routes = fleet.taking(routes, request.path)
    if #request.routes == 0 then
        return answer.refuse(request, 404, { message = "The model is not served at this path.", code = "not_served", param = "model" })
    end
end

local function pick(request, avoided)
    while true do
        local route, backend = balance.pick(request.routes, request.keys, avoided)
        if not backend then
            return false
        end
        local taken = state.enter(backend.id)
        if not backend.most_requests or taken <= backend.most_requests then
            request.route, request.backend, request.running = route, backend, true
            if state.speaks_tls(backend.id) then
                ngx.var.gateway_upstream, ngx.var.gateway_tls_name = "https://tls_backends", backend.host
            else
                ngx.var.gateway_upstream = "http://backends"
            end
            return true
        end
        -- another worker was faster
        state.leave(backend.id)
    end
end

-- No backend takes it.
local function refuse_all(request)
    local full = balance.full(request.routes)
    return answer.refuse(request, 503, {
        retry_after = RETRY_AFTER,
        code = full and "queue_full" or nil,
        message = full and "All model servers are full. Try again later." or nil,
    })
end

-- Content phase, after the limits for each address.
function gateway.route()
    local request = current()
    count(request)
    if request.path:sub(1, #MODELS) == MODELS then
        return list_models(request)
    end
    account.admit(request)
    enter(request)
    read(request)
    find_routes(request)
    request.keys = question.keys(request.asked, request.routes)
    question.put(request.asked, request.routes[1].model, account.wishes(request))
    -- the text is Nginx's now
    request.asked = nil
    if not pick(request) then
        return refuse_all(request)
    end
    ngx.var.gateway_path = request.path
    ngx.var.gateway_authorization = fleet.authorization
    return ngx.exec("@ask")
end

-- balancer_by_lua
function gateway.balance()
    local backend = current().backend
    assert(balancer.set_current_peer(backend.address, backend.port))
end

local function leave(request)
    if request.running then
        request.running = false
        state.leave(request.backend.id)
    end
end

-- Whether another backend may be asked: nothing of an answer has come, and the prompt has not been lost by its own fault.
local function may_go_again(request, status)
    if not request.route.retry then
        return false
    elseif status == 504 then
        -- without a connection it cannot have been read
        local connected = ngx.var.upstream_connect_time
        return connected == nil or connected == "" or connected == "-"
    elseif status == 500 then
        local id = request.backend.id
        return state.leaving(id) or not state.used(id)
    end
    return true
end

-- Rewrite phase of the second attempt, after an error before the answer began.
function gateway.again()
    local request = current()
    local status = tonumber((ngx.var.upstream_status or ""):match("%d+$")) or 502
    if status == 401 then
        -- the backend does not know the gateway's key: no fault of the client's, and none of its business
        status = 502
        ngx.header["WWW-Authenticate"] = nil
    end
    local former = request.backend
    leave(request)
    state.failed(former.id)
    account.failed(request)
    if not may_go_again(request, status) or not pick(request, former) then
        return answer.refuse(request, status, { retry_after = status == 503 and RETRY_AFTER or nil })
    end
    account.went_again(request, former)
end

-- Content of errors that Nginx or the program made. Of a request that could not be read, nginx.conf knows the status, and Nginx's own number for why.
function gateway.error(known_status, reason)
    local request = current()
    local status = known_status or ngx.status
    ngx.status = status
    if request then
        request.told = true
        if request.running and status >= 500 then
            state.failed(request.backend.id)
        end
    end
    local retry_after
    if status == 429 then
        retry_after = request and request.client and settings.address_retry_after or settings.unauthorized_retry_after
    elseif status == 503 then
        retry_after = RETRY_AFTER
    end
    return answer.error(request, retry_after, reason)
end

-- As OpenAI says it.
local function tell_left(of, what)
    if what then
        ngx.header["x-ratelimit-limit-" .. of] = what.limit
        ngx.header["x-ratelimit-remaining-" .. of] = what.left
        ngx.header["x-ratelimit-reset-" .. of] = what.reset
    end
end

-- header_filter_by_lua: what is left to the client, and errors of vLLM that are put into shape by what follows.
function gateway.headers()
    local request = current()
    cors.tell(ngx.header, ngx.var, request and request.asked_beforehand)
    if request then
        tell_left("requests", request.rate)
        tell_left("tokens", request.tokens)
    end
    if request and request.running and ngx.status == NO_HTTP then
        state.failed(request.backend.id)
        return ngx.exit(ngx.ERROR)
    end
    if request and request.running and not request.told and ngx.status >= 400 then
        request.error_parts = {}
        ngx.header["Content-Length"] = nil
        ngx.header["Content-Type"] = "application/json"
    elseif request and request.running and not request.told then
        account.begin(request)
    end
end

-- body_filter_by_lua
function gateway.body()
    local request = current()
    local parts = request and request.error_parts
    if not parts then
        if request and (request.stream or request.whole) then
            local chunk = ngx.arg[1]
            local passed_on = account.chunk(request, chunk, ngx.arg[2])
            -- what is set is copied
            if passed_on ~= chunk then
                ngx.arg[1] = passed_on
            end
        end
        return
    end
    table.insert(parts, ngx.arg[1])
    ngx.arg[1] = nil
    if ngx.arg[2] then
        ngx.arg[1] = answer.translated(ngx.status, table.concat(parts))
        request.error_parts = nil
    end
end

-- log_by_lua: every request ends here, also one whose client went away.
function gateway.log()
    local variables, request = ngx.var, current()
    if not request then
        return
    end
    running[request.id] = nil
    leave(request)
    if request.entered then
        limit.leave(limits, request.client.name, ngx.worker.pid(), ngx.now() - request.entered)
    end
    account.close(request)
    variables.gateway_client = request.client and request.client.name or ""
    if request.route then
        variables.gateway_model, variables.gateway_route = request.route.model, request.route.instance
        variables.gateway_backend = request.backend.id
    end
end

local function tell(value)
    return answer.say(cjson.encode(value))
end

-- Which program and which data answer.
function gateway.health()
    return tell({ status = "ok", configuration = fleet.id, program = settings.program })
end

-- For Prometheus.
function gateway.metrics()
    return account.render()
end

-- For the checks service.
function gateway.in_flight()
    return tell(state.in_flight())
end

return gateway
