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

local SLICE = 100
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
    { name = "vllm_gateway_backend_requests_total", type = "counter", help = "Requests of a backend, by how they ended there: ok, error, cut." },
    { name = "vllm_gateway_first_token_seconds", type = "histogram", help = "Time until the answer began.", buckets = FIRST_TOKEN },
    { name = "vllm_gateway_backend_first_token_seconds", type = "histogram", help = "Time until a backend's answer began.", buckets = FIRST_TOKEN },
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

-- What the dictionary has. Another program, with more metrics, may go on with it after a reload, so the number of a series is its own for good.
--   #              how many series were numbered; some numbers may have been used by none
--   NAME{LABELS    the number of a series, say 17
--   17             its value: a counter's, or the seconds of a histogram
--   17:4           one of its buckets: what is in it and not in the ones before
--   NAME#          how many series a metric has
--   NAME#3         the labels of one of them
-- Each request counts in many series, so what it looks for is short, and its name is made once for each worker.
local places = setmetatable({}, { __mode = "k" })

-- Gives a series its number, for all workers the same. Nothing when the dictionary is full.
local function numbered(dict, name, labels)
    local key = name .. "{" .. labels
    local found = dict:get(key)
    if found then
        return found
    end
    dict:safe_add("#", 0)
    local new = dict:incr("#", 1)
    if new and dict:safe_add(key, new) then
        dict:safe_add(name .. "#", 0)
        dict:safe_set(name .. "#" .. (dict:incr(name .. "#", 1) or 0), labels)
    end
    return dict:get(key)
end

local function place_of(dict, name, labels)
    local known = places[dict] or {}
    places[dict] = known
    known[name] = known[name] or {}
    local found = known[name][labels]
    if not found then
        local number_of = numbered(dict, name, labels)
        found = number_of and { value = tostring(number_of) }
        known[name][labels] = found
    end
    return found
end

local function bucket(found, index)
    local key = found[index]
    if not key then
        key = found.value .. ":" .. index
        found[index] = key
    end
    return key
end

local function add(dict, key, n)
    if not dict:incr(key, n) then
        dict:safe_add(key, 0)
        dict:incr(key, n)
    end
end

function metrics.count(dict, name, labels, n)
    assert(by_name[name], name)
    local found = place_of(dict, name, labels)
    if found then
        add(dict, found.value, n)
    end
end

-- The seconds of all are what stands for the series.
function metrics.observe(dict, name, labels, seconds)
    local buckets = by_name[name].buckets
    local index = 1
    while buckets[index] and seconds > buckets[index] do
        index = index + 1
    end
    local found = place_of(dict, name, labels)
    if found then
        add(dict, found.value, seconds)
        add(dict, bucket(found, index), 1)
    end
end

local function number(value)
    return value == math.floor(value) and ("%d"):format(value) or ("%.14g"):format(value)
end

local function counter(metric, text, value)
    return metric.name .. "{" .. text .. "} " .. number(value) .. "\n"
end

local function histogram(metric, text, seconds, in_bucket)
    local name, buckets = metric.name, metric.buckets
    local lines, sum = {}, 0
    for index = 1, #buckets + 1 do
        sum = sum + in_bucket(index)
        local limit = buckets[index] and tostring(buckets[index]) or "+Inf"
        lines[index] = ("%s_bucket{%s,le=\"%s\"} %d\n"):format(name, text, limit, sum)
    end
    return table.concat(lines) .. ("%s_sum{%s} %s\n%s_count{%s} %d\n"):format(name, text, number(seconds), name, text, sum)
end

-- A series as it is written; nothing for one that had no room.
local function series(dict, metric, at)
    local text = dict:get(metric.name .. "#" .. at)
    local found = text and place_of(dict, metric.name, text)
    local value = found and dict:get(found.value)
    if not value then
        return nil
    end
    return metric.buckets
        and histogram(metric, text, value, function(index) return dict:get(bucket(found, index)) or 0 end)
        or counter(metric, text, value)
end

local function render_metric(dict, metric, write, pause)
    local name = metric.name
    local lines = { ("# HELP %s %s\n# TYPE %s %s\n"):format(name, metric.help, name, metric.type) }
    for at = 1, dict:get(name .. "#") or 0 do
        lines[#lines + 1] = series(dict, metric, at)
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
