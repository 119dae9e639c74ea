-- Which pages of other origins may ask: a browser keeps an answer from a page unless the answer names the page's origin. Keys come in headers, never
-- in cookies, so nothing is said of credentials.
local cors = {}

-- What a page may read of an answer's header, beside what it always may.
local EXPOSED = table.concat({
    "x-request-id", "retry-after",
    "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens",
}, ", ")
-- How long a browser need not ask beforehand again, in seconds.
local MAX_AGE = 7200

-- The origins as a set; nil without any.
local allowed

function cors.load(origins)
    allowed = nil
    for _, origin in ipairs(origins) do
        allowed = allowed or {}
        allowed[origin] = true
    end
end

-- Whether a browser asks beforehand if its page may ask. It has no key then.
function cors.asks_beforehand(method, variables)
    return allowed and method == "OPTIONS" and variables.http_origin and variables.http_access_control_request_method
end

-- Puts what a browser wants to know into the header of any answer. `methods` when it asked beforehand.
function cors.tell(header, variables, methods)
    if not allowed then
        return
    end
    header["Vary"] = methods and "Origin, Access-Control-Request-Headers" or "Origin"
    local origin = variables.http_origin
    if not origin or not allowed[origin] then
        return
    end
    header["Access-Control-Allow-Origin"] = origin
    if methods then
        header["Access-Control-Allow-Methods"] = methods
        -- whatever the libraries add: none of it goes further than to here
        header["Access-Control-Allow-Headers"] = variables.http_access_control_request_headers
        header["Access-Control-Max-Age"] = MAX_AGE
    else
        header["Access-Control-Expose-Headers"] = EXPOSED
    end
end

return cors
