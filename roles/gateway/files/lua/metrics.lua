-- Counters and histograms in a dictionary that all workers share and that outlives reloads, written as Prometheus reads them.
--
-- Each series is numbered when it is first counted, so that a scrape finds them all without a list of the dictionary's keys, which would lock it.
-- A full dictionary takes no more series; it never drops one, as it would with `set` and `add`.
--
--   labels(name, value, ...)             labels as they are written, in the order given; making them costs more than counting, so keep them
--   count(dict, name, labels, n)         adds n to a counter
--   observe(dict, name, labels, seconds) puts a duration into a histogram
--   render(dict, write, pause)           calls write(text) for some series at a time, and pause() in between
--   METRICS                              what there is: name, type, help, and the limits of the buckets
local metrics = {}

local SLICE = 200
local FIRST_TOKEN = { 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160 }
local DURATION = { 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280 }

metrics.METRICS = {
    { name = "vllm_gateway_requests_total", type = "counter", help = "Requests that ended, by the status that the client got." },
    { name = "vllm_gateway_prompt_tokens_total", type = "counter", help = "Tokens of prompts, those from the cache included." },
    { name = "vllm_gateway_cached_tokens_total", type = "counter", help = "Tokens of prompts that came from the cache." },
    { name = "vllm_gateway_completion_tokens_total", type = "counter", help = "Tokens that were generated." },
    { name = "vllm_gateway_sound_seconds_total", type = "counter", help = "Seconds of sound that were heard." },
    { name = "vllm_gateway_estimated_total", type = "counter", help = "Requests whose tokens were estimated, because their stream was cut." },
    { name = "vllm_gateway_limited_total", type = "counter", help = "Requests that were turned down by a limit of their client." },
    { name = "vllm_gateway_retries_total", type = "counter", help = "Requests that went to another backend, by the one that failed." },
    { name = "vllm_gateway_first_token_seconds", type = "histogram", help = "Time until the answer began.", buckets = FIRST_TOKEN },
    { name = "vllm_gateway_duration_seconds", type = "histogram", help = "Time until the answer was over.", buckets = DURATION },
}

local by_name = {}
for _, metric in ipairs(metrics.METRICS) do
    by_name[metric.name] = metric
end

local ESCAPES = { ["\\"] = "\\\\", ['"'] = '\\"', ["\n"] = "\\n" }

function metrics.labels(...)
    local parts = {}
    for index = 1, select("#", ...), 2 do
        local name, value = select(index, ...)
        parts[#parts + 1] = name .. '="' .. tostring(value):gsub('[\\"\n]', ESCAPES) .. '"'
    end
    return table.concat(parts, ",")
end

-- Returns whether the key is new, which it seldom is.
local function add(dict, key, n)
    if dict:incr(key, n) then
        return false
    end
    local new = dict:safe_add(key, 0)
    dict:incr(key, n)
    return new
end

-- A series has its place in the list of its metric from its first count on.
local function add_series(dict, name, labels, n)
    if add(dict, name .. "{" .. labels, n) then
        dict:safe_add(name .. "#", 0)
        dict:safe_set(name .. "#" .. dict:incr(name .. "#", 1), labels)
    end
end

function metrics.count(dict, name, labels, n)
    assert(by_name[name], name)
    add_series(dict, name, labels, n)
end

-- A bucket has what is not in the ones before it. The seconds of all are what stands for the series.
function metrics.observe(dict, name, labels, seconds)
    local buckets = by_name[name].buckets
    local index = 1
    while buckets[index] and seconds > buckets[index] do
        index = index + 1
    end
    add_series(dict, name, labels, seconds)
    add(dict, name .. "{" .. labels .. "#" .. index, 1)
end

local function number(value)
    return value == math.floor(value) and ("%d"):format(value) or ("%.14g"):format(value)
end

local function counter(dict, name, text)
    return name .. "{" .. text .. "} " .. number(dict:get(name .. "{" .. text) or 0) .. "\n"
end

local function histogram(dict, name, text, buckets)
    local lines, sum = {}, 0
    for index = 1, #buckets + 1 do
        sum = sum + (dict:get(name .. "{" .. text .. "#" .. index) or 0)
        local limit = buckets[index] and tostring(buckets[index]) or "+Inf"
        lines[index] = ("%s_bucket{%s,le=\"%s\"} %d\n"):format(name, text, limit, sum)
    end
    local seconds = number(dict:get(name .. "{" .. text) or 0)
    return table.concat(lines) .. ("%s_sum{%s} %s\n%s_count{%s} %d\n"):format(name, text, seconds, name, text, sum)
end

local function render_metric(dict, metric, write, pause)
    local name = metric.name
    local lines = { ("# HELP %s %s\n# TYPE %s %s\n"):format(name, metric.help, name, metric.type) }
    for index = 1, dict:get(name .. "#") or 0 do
        local text = dict:get(name .. "#" .. index)
        if text then
            lines[#lines + 1] = metric.buckets and histogram(dict, name, text, metric.buckets) or counter(dict, name, text)
        end
        if #lines >= (metric.buckets and SLICE / 10 or SLICE) then
            write(table.concat(lines))
            lines = {}
            pause()
        end
    end
    write(table.concat(lines))
end

function metrics.render(dict, write, pause)
    for _, metric in ipairs(metrics.METRICS) do
        render_metric(dict, metric, write, pause)
    end
end

return metrics
