-- What requests use: their budgets, what their answers tell, and the counts of it. gateway.lua calls the functions in this order.
local answer = require "answer"
local fleet = require "fleet"
local keys = require "keys"
local limit = require "limit"
local metrics = require "metrics"
local state = require "state"
local usage = require "usage"

local account = {}

local limits, counts = ngx.shared.gateway_limits, ngx.shared.gateway_counts

-- Where a stream tells what it used only when stream_options ask for it.
local ASKED = { ["/v1/chat/completions"] = true, ["/v1/completions"] = true }
-- What a prompt has where no answer of its model has told it yet: text of Europe's languages.
local TOKENS_PER_BYTE = 0.25
local STREAM, JSON = "text/event-stream", "application/json"
-- How much the last answer weighs in the average.
local WEIGHT = 0.1

local SPENT = {
    minute = { message = "The tokens per minute of this client are used up. Wait and try again." },
    day = { message = "The tokens per day of this client are used up. The next day begins at midnight UTC.", code = "insufficient_quota" },
    month = { message = "The tokens per month of this client are used up. The next month begins at midnight UTC.", code = "insufficient_quota" },
}

function account.limited(request, name)
    metrics.count(counts, "vllm_gateway_limited_total", metrics.labels("client", request.client.name, "limit", name), 1)
end

-- Refuses a client that has no tokens left.
function account.admit(request)
    local client = request.client
    local within, left, rest = limit.tokens(limits, client.name, client, ngx.now())
    if not within then
        account.limited(request, "tokens_per_" .. rest)
        local spent = SPENT[rest]
        return answer.refuse(request, 429, { retry_after = math.ceil(left), message = spent.message, code = spent.code })
    end
    request.tokens = left and { limit = client.tokens_per_minute, left = left, reset = limit.duration(rest) }
end

-- How urgent the requests of a client are, where every instance that may get this one heeds it; the others refuse to be told.
local function priority_of(request)
    for _, route in ipairs(request.routes) do
        if not route.priority then
            return nil
        end
    end
    return request.client.priority and tostring(request.client.priority)
end

-- What has to change in the body, so that a stream tells what it used, and vLLM knows the client's priority.
function account.wishes(request)
    local asked = request.asked
    request.bytes = #asked.text
    if not asked.fields then
        return {}
    end
    local options = ASKED[request.path] and usage.ask(asked.text, asked.fields) or nil
    request.ours = options ~= nil
    return { stream_options = options, priority = priority_of(request) }
end

-- header_filter: what kind of answer begins.
function account.begin(request)
    local kind = ngx.header["Content-Type"] or ""
    if kind:sub(1, #STREAM) == STREAM then
        request.stream = usage.stream(request.ours)
        if request.ours then
            ngx.header["Content-Length"] = nil
        end
    elseif kind:sub(1, #JSON) == JSON then
        request.whole = usage.answer()
    end
end

-- body_filter: what goes on to the client.
function account.chunk(request, chunk, last)
    if not request.first and chunk ~= "" then
        ngx.update_time()
        request.first = ngx.now() - ngx.req.start_time()
    end
    if request.stream then
        return request.stream:feed(chunk, last)
    elseif request.whole then
        request.whole:feed(chunk)
    end
    return chunk
end

-- What the prompt of a cut stream had: as many tokens for its bytes as others of its model.
local function guess(request)
    return math.ceil(request.bytes * (counts:get("tokens_per_byte:" .. request.route.model) or TOKENS_PER_BYTE))
end

local function learn(request, used)
    if used.prompt and not used.estimated and request.bytes > 0 then
        local key, ratio = "tokens_per_byte:" .. request.route.model, used.prompt / request.bytes
        local average = counts:get(key)
        counts:safe_set(key, average and average + WEIGHT * (ratio - average) or ratio)
    end
end

local function used_by(request)
    if request.stream then
        return request.stream:result(guess(request))
    end
    return request.whole and request.whole:result() or {}
end

-- Who asks without a valid key, and what an answer without an account has used.
local nobody, nothing = {}, {}

local function count_some(name, labels, n)
    if n and n > 0 then
        metrics.count(counts, name, labels, n)
    end
end

local function count_tokens(labels, used)
    count_some("vllm_gateway_prompt_tokens_total", labels, used.prompt)
    count_some("vllm_gateway_cached_tokens_total", labels, used.cached)
    count_some("vllm_gateway_completion_tokens_total", labels, used.completion)
    count_some("vllm_gateway_sound_seconds_total", labels, used.seconds)
    count_some("vllm_gateway_estimated_total", labels, used.estimated and 1)
end

local function count_times(request)
    local route = request.route
    route.labels = route.labels or metrics.labels("model", route.model, "instance", route.instance)
    metrics.observe(counts, "vllm_gateway_duration_seconds", route.labels, ngx.now() - ngx.req.start_time())
    if request.stream and request.first then
        metrics.observe(counts, "vllm_gateway_first_token_seconds", route.labels, request.first)
    end
end

-- The labels of a backend, alone and with each way in which a request may end there. They are kept at the backend.
local function labels_of_backend(backend)
    if not backend.labels then
        local alone = metrics.labels("backend", backend.id)
        local function with(outcome)
            return alone .. "," .. metrics.labels("outcome", outcome)
        end
        backend.labels = { alone = alone, ok = with("ok"), error = with("error"), cut = with("cut") }
    end
    return backend.labels
end

-- How a request ended at a backend. An error counts there also where another backend answered then.
local function ended(backend, outcome)
    metrics.count(counts, "vllm_gateway_backend_requests_total", labels_of_backend(backend)[outcome], 1)
end

function account.failed(request)
    request.failed = true
    ended(request.backend, "error")
end

-- The end at the backend that was asked last. A stream is cut when its client or its backend went away, and when an error is its end.
local function end_at_backend(request, used)
    local status, outcome = ngx.status, "ok"
    if status == 499 or used.estimated then
        outcome = "cut"
    elseif status >= 500 then
        outcome = "error"
    end
    ended(request.backend, outcome)
    if request.stream and request.first then
        metrics.observe(counts, "vllm_gateway_backend_first_token_seconds", labels_of_backend(request.backend).alone, request.first)
    end
end

local function log(request, used)
    local variables = ngx.var
    variables.gateway_prompt_tokens, variables.gateway_completion_tokens = used.prompt, used.completion
    if used.cached then
        variables.gateway_cached_tokens = used.cached
    end
    if used.estimated then
        variables.gateway_estimated = "true"
    end
    if request.first then
        variables.gateway_first_token = ("%.3f"):format(request.first)
    end
end

-- The labels of what a client asks of a route, either of which may be unknown. They are kept at the client: a new configuration has new ones.
local function labels_of(client, route)
    local kept = client or nobody
    kept.labels = kept.labels or {}
    local number = route and route.number or 0
    local labels = kept.labels[number]
    if not labels then
        local model, instance = route and route.model or "", route and route.instance or ""
        labels = metrics.labels("client", client and client.name or "", "model", model, "instance", instance)
        kept.labels[number] = labels
    end
    return labels
end

-- The same with a status before them.
local with_status = setmetatable({}, { __index = function(made, status)
    made[status] = keys('status="' .. status .. '",')
    return rawget(made, status)
end })

-- log: the end of a request, with or without an answer. Charged is what it used, now that it is known.
function account.close(request)
    local client, labels = request.client, labels_of(request.client, request.route)
    metrics.count(counts, "vllm_gateway_requests_total", with_status[ngx.status][labels], 1)
    local answered = request.stream or request.whole
    local used = answered and used_by(request) or nothing
    if request.backend and not request.failed then
        end_at_backend(request, used)
    end
    if not answered then
        return
    end
    limit.charge(limits, client.name, client, (used.prompt or 0) + (used.completion or 0), ngx.now())
    learn(request, used)
    count_tokens(labels, used)
    count_times(request)
    log(request, used)
end

function account.went_again(request, backend)
    request.failed = false
    metrics.count(counts, "vllm_gateway_retries_total", metrics.labels("backend", backend.id), 1)
end

local function gauge(write, name, help, lines)
    write(("# HELP %s %s\n# TYPE %s gauge\n"):format(name, help, name) .. table.concat(lines))
end

-- What is so at this moment.
local function gauges(write)
    local used, in_flight, ends = {}, {}, {}
    for id in pairs(fleet.backends) do
        local label = metrics.labels("backend", id)
        used[#used + 1] = ("vllm_gateway_backend_used{%s} %d\n"):format(label, state.used(id) and 1 or 0)
        in_flight[#in_flight + 1] = ("vllm_gateway_in_flight{%s} %d\n"):format(label, state.in_flight_of(id))
    end
    for _, name in ipairs(state.CERTIFICATES) do
        local label, time = metrics.labels("certificate", name), state.not_after(name)
        ends[#ends + 1] = time and ("vllm_gateway_certificate_expiry_timestamp_seconds{%s} %d\n"):format(label, time)
    end
    local age = state.age()
    gauge(write, "vllm_gateway_backend_used", "Whether the gateway sends requests to a backend.", used)
    gauge(write, "vllm_gateway_in_flight", "Requests that a backend has to answer.", in_flight)
    gauge(write, "vllm_gateway_state_age_seconds", "For how long the checks have written no state.",
        { age and ("vllm_gateway_state_age_seconds %.3f\n"):format(age) })
    gauge(write, "vllm_gateway_certificate_expiry_timestamp_seconds", "When a certificate ends.", ends)
end

-- For Prometheus, some series at a time: streams go on in between.
function account.render()
    ngx.header["Content-Type"] = "text/plain; version=0.0.4"
    gauges(ngx.print)
    metrics.render(counts, ngx.print, function()
        ngx.flush(true)
        ngx.sleep(0.001)
    end)
end

return account
