-- What the gateway itself says to clients: errors in the shape of OpenAI's, and the list of models.
local cjson = require "cjson.safe"

local answer = {}

-- What is said of a status when nothing better is known.
local ERRORS = {
    [400] = { "invalid_request_error", "bad_request", "The request is malformed." },
    [401] = { "authentication_error", "invalid_api_key",
        "The API key is missing, wrong or expired. Send it as: Authorization: Bearer KEY" },
    [403] = { "permission_error", "forbidden", "This is not allowed." },
    [404] = { "invalid_request_error", "not_found", "This path does not exist here." },
    [405] = { "invalid_request_error", "method_not_allowed", "This path does not take this method." },
    [408] = { "invalid_request_error", "request_timeout", "The request took too long to arrive." },
    [413] = { "invalid_request_error", "request_too_large", "The request is too large." },
    [414] = { "invalid_request_error", "uri_too_long", "The address of the request is too long." },
    [415] = { "invalid_request_error", "unsupported_media_type", "This path does not take this kind of body." },
    [429] = { "rate_limit_error", "rate_limit_exceeded", "Too many requests. Wait and try again." },
    [495] = { "authentication_error", "invalid_client_certificate",
        "The certificate of the client is not valid, or not of the authority that is asked for." },
    [496] = { "authentication_error", "client_certificate_required", "The client has to show a certificate in the TLS handshake." },
    [500] = { "server_error", "internal_error", "The model server failed." },
    [502] = { "server_error", "bad_gateway", "The model server broke off. Try again." },
    [503] = { "server_error", "unavailable", "No model server is available. Try again later." },
    [504] = { "server_error", "timeout", "The model server did not answer in time." },
}

-- Nginx's own numbers for what is no request: a header too large, no proper TLS, no such method or version.
local function known(status)
    return ERRORS[status] or ERRORS[status >= 500 and 500 or 400]
end

-- An error as OpenAI writes it; what is nil comes from the status.
function answer.text(status, code, message, param)
    local kind, usual, said = unpack(known(status))
    return cjson.encode({
        error = { message = message or said, type = kind, param = param or cjson.null, code = code or usual },
    })
end

-- The whole answer of the gateway. What is left of the request's body must not be taken for the next request.
function answer.say(text)
    pcall(ngx.req.discard_body)
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #text
    ngx.print(text)
end

-- Ends the request with an error. `more` may have code, message, param, headers, and as `reason` a number of ERRORS that says more than the status.
-- Nginx comes back for the text by answer.error.
function answer.refuse(request, status, more)
    request.refusal = more or {}
    request.refusal.status = status
    return ngx.exit(status)
end

-- The content of every error that no backend wrote.
function answer.error(request, retry_after, reason)
    local status = ngx.status
    local refusal = request and request.refusal
    if not refusal or refusal.status ~= status then
        refusal = {}
    end
    ngx.header["Retry-After"] = refusal.retry_after or retry_after
    ngx.header["Allow"] = refusal.allow
    ngx.header["WWW-Authenticate"] = status == 401 and "Bearer" or nil
    answer.say(answer.text(reason or refusal.reason or status, refusal.code, refusal.message, refusal.param))
end

-- vLLM answers in two shapes: OpenAI's, which is passed on, and that of its framework, {"detail": ...}.
function answer.translated(status, text)
    local said = cjson.decode(text)
    if type(said) == "table" and type(said.error) == "table" then
        return text
    end
    local detail = type(said) == "table" and said.detail
    if type(detail) == "table" then
        detail = type(detail[1]) == "table" and detail[1].msg
    end
    return answer.text(status, status == 404 and "not_served" or nil,
        type(detail) == "string" and detail ~= "Not Found" and detail or status == 404 and "The model does not have this path." or nil)
end

local function model(name, since)
    return { id = name, object = "model", created = since, owned_by = "vllm" }
end

-- GET /v1/models
function answer.models(names, since)
    local list = {}
    for position, name in ipairs(names) do
        list[position] = model(name, since)
    end
    -- cjson writes an empty list as {}
    answer.say(#list > 0 and cjson.encode({ object = "list", data = list }) or '{"object":"list","data":[]}')
end

-- GET /v1/models/{id}
function answer.model(name, since)
    answer.say(cjson.encode(model(name, since)))
end

return answer
