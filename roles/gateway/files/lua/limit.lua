-- How much a client may ask: requests and tokens per minute, tokens per day and month, requests at a time. The counts lie in a dictionary that all
-- workers share and that outlives reloads. It is passed in, as the clock is; a limit that is nil is none.
--
--   rate(dict, name, per_minute, burst, now)  one more request: true, how many could follow at once, seconds until all of `burst` could;
--                                             or false and seconds until it could come
--   enter(dict, name, owner, most)            a request begins: true; or false and seconds until one of them can be expected to end.
--   leave(dict, name, owner, seconds)         it has ended, after so many seconds. `owner` is the worker's process id
--   sweep(dict, alive)                        gives back what owners held that are not alive any more
--   running(dict, name)                       how many requests run
--   tokens(dict, name, limits, now)           whether a client has tokens left: true, what is left of this minute's, seconds until all are;
--                                             or false, seconds until it has some again, and of which limit it has none: "minute", "day" or "month".
--   charge(dict, name, limits, count, now)    counts what an answer used. `limits` has tokens_per_minute, tokens_per_day, tokens_per_month
--   used(dict, name, now)                     {day, month}: tokens of this day and this month, of those that are limited
--   restore(dict, name, time, used, now)      puts back what was used at a time; a day or a month that is over is left out
--   duration(seconds)                         as OpenAI writes it in its headers: 1m30s, 250ms
--
-- Days and months are those of UTC. A minute is none of the clock: what flows back all the time is a minute's worth at most, and never more than that
-- lies there. An answer may use more than was left; then the next one waits until that has flowed back.
local keys = require "keys"

local limit = {}

-- Times are kept from here on: those since 1970 leave too few digits for many small additions. What is still lost to rounding must not turn down
-- the last of a burst; this part of a request is forgiven.
local BEGINNING = 1767225600
local FORGIVEN = 0.01
-- How much the last request's duration weighs in the average.
local WEIGHT = 0.1
-- A worker holds a lock for microseconds; one that dies in them keeps it so long.
local LOCK_SECONDS = 0.02
local LOCK_TRIES = 2000
local DAY = 86400
-- Stands for an owner that has been swept. One that is missing is just being written.
local GONE = 0

local lock_key, rate_key, minute_key, total_key, took_key = keys("lock:"), keys("rate:"), keys("minute:"), keys("in:"), keys("took:")

-- Runs a change of a value that reads it first. Without the lock, when it cannot be had, two workers may let one request too many pass.
local function locked(dict, key, change, ...)
    local lock = lock_key[key]
    local tries = 0
    while not dict:add(lock, true, LOCK_SECONDS) and tries < LOCK_TRIES do
        tries = tries + 1
    end
    local first, second, third = change(dict, key, ...)
    dict:delete(lock)
    return first, second, third
end

-- A bucket is kept as the time at which it will be full again. `size` is how many seconds an empty one takes for that; `cost` is what is taken out.
local function full_at(dict, key, now)
    return math.max(dict:get(key) or 0, now)
end

local function put(dict, key, time, now)
    dict:set(key, time, time - now + 1)
end

local function take(dict, key, cost, size, now)
    local time = full_at(dict, key, now) + cost
    if time > now + size + cost * FORGIVEN then
        return false, time - now - size
    end
    put(dict, key, time, now)
    return true, time
end

local function pour_out(dict, key, cost, now)
    put(dict, key, full_at(dict, key, now) + cost, now)
end

function limit.rate(dict, name, per_minute, burst, now)
    if not per_minute then
        return true
    end
    now = now - BEGINNING
    local each = 60 / per_minute
    local size = each * math.max(burst or 1, 1)
    local within, time = locked(dict, rate_key[name], take, each, size, now)
    if not within then
        return false, time
    end
    return true, math.floor((now + size - time) / each + FORGIVEN), time - now
end

-- Requests at a time.

-- For each owner. A worker is one, and asks for no other's but those of dead ones.
local owner_keys = {}

local function owner_key(name, owner)
    local of_owner = owner_keys[owner]
    if not of_owner then
        of_owner = keys("in:", ":" .. owner)
        owner_keys[owner] = of_owner
    end
    return of_owner[name]
end

-- Numbers what is put under a key, so that it can be found again without a list of all keys.
local function append(dict, key, value)
    dict:set(key .. "#" .. dict:incr(key, 1, 0), value)
end

-- What an owner held is found by its names, an owner by its number.
local function note(dict, name, owner)
    if dict:add("owner:" .. owner, true) then
        append(dict, "owners", owner)
    end
    append(dict, "held:" .. owner, name)
end

local function add(dict, key, count)
    local left = dict:incr(key, count)
    if left and left < 0 then
        dict:incr(key, -left)
    end
end

function limit.running(dict, name)
    return dict:get(total_key[name]) or 0
end

-- With `most` running, one of them ends every so many seconds.
local function wait(dict, name, most)
    return (dict:get(took_key[name]) or 1) / math.max(most, 1)
end

function limit.enter(dict, name, owner, most)
    local total = total_key[name]
    local running = dict:incr(total, 1, 0)
    if most and running > most then
        dict:incr(total, -1)
        return false, wait(dict, name, most)
    end
    local own = owner_key(name, owner)
    if not dict:incr(own, 1) then
        note(dict, name, owner)
        dict:incr(own, 1, 0)
    end
    return true
end

function limit.leave(dict, name, owner, seconds)
    add(dict, total_key[name], -1)
    add(dict, owner_key(name, owner), -1)
    if seconds then
        local key = took_key[name]
        local average = dict:get(key)
        dict:set(key, average and average + WEIGHT * (seconds - average) or seconds)
    end
end

local function give_back(dict, owner)
    local held = "held:" .. owner
    for number = 1, dict:get(held) or 0 do
        local name = dict:get(held .. "#" .. number)
        if name then
            add(dict, total_key[name], -(dict:get(owner_key(name, owner)) or 0))
            dict:delete(owner_key(name, owner))
            dict:delete(held .. "#" .. number)
        end
    end
    dict:delete(held)
    dict:delete("owner:" .. owner)
    owner_keys[owner] = nil
end

function limit.sweep(dict, alive)
    local first, last = dict:get("owners_from") or 1, dict:get("owners") or 0
    for number = first, last do
        local key = "owners#" .. number
        local owner = dict:get(key)
        if owner and owner ~= GONE and not alive(owner) then
            give_back(dict, owner)
            dict:set(key, GONE)
            owner = GONE
        end
        if owner == GONE and number == first then
            dict:delete(key)
            first = first + 1
        end
    end
    dict:set("owners_from", first)
end

-- Tokens.

-- The month that is, as text, and when it began and will end: looked up once a month.
local month = { from = 0, to = 0 }

local function month_of(now)
    if now < month.from or now >= month.to then
        local date = os.date("!*t", now)
        local first, day = now - now % DAY - (date.day - 1) * DAY, now - now % DAY
        repeat
            day = day + DAY
        until os.date("!*t", day).month ~= date.month
        month = { text = os.date("!%Y-%m", now), from = first, to = day }
    end
    return month
end

local function day_key(name, now)
    return "day:" .. name .. ":" .. math.floor(now / DAY)
end

local function month_key(name, now)
    return "month:" .. name .. ":" .. month_of(now).text
end

local function until_tomorrow(now)
    return DAY - now % DAY
end

local function until_next_month(now)
    return month_of(now).to - now
end

-- A minute's tokens are a bucket of 60 seconds.
local function of_minute(dict, name, per_minute, now)
    local ahead = full_at(dict, minute_key[name], now - BEGINNING) - (now - BEGINNING)
    if ahead >= 60 then
        return false, ahead - 60 + 60 / per_minute, "minute"
    end
    return true, math.floor((60 - ahead) / 60 * per_minute + FORGIVEN), ahead
end

function limit.tokens(dict, name, limits, now)
    if limits.tokens_per_month and (dict:get(month_key(name, now)) or 0) >= limits.tokens_per_month then
        return false, until_next_month(now), "month"
    elseif limits.tokens_per_day and (dict:get(day_key(name, now)) or 0) >= limits.tokens_per_day then
        return false, until_tomorrow(now), "day"
    elseif limits.tokens_per_minute then
        return of_minute(dict, name, limits.tokens_per_minute, now)
    end
    return true
end

function limit.charge(dict, name, limits, count, now)
    if count <= 0 then
        return
    end
    if limits.tokens_per_minute then
        locked(dict, minute_key[name], pour_out, count * 60 / limits.tokens_per_minute, now - BEGINNING)
    end
    if limits.tokens_per_day then
        dict:incr(day_key(name, now), count, 0, until_tomorrow(now) + 1)
    end
    if limits.tokens_per_month then
        dict:incr(month_key(name, now), count, 0, until_next_month(now) + 1)
    end
end

function limit.used(dict, name, now)
    return { day = dict:get(day_key(name, now)) or 0, month = dict:get(month_key(name, now)) or 0 }
end

local function put_back(dict, key, key_now, count, seconds)
    if key == key_now then
        dict:set(key, count, seconds)
    end
end

function limit.restore(dict, name, time, used, now)
    put_back(dict, day_key(name, time), day_key(name, now), used.day, until_tomorrow(now) + 1)
    put_back(dict, month_key(name, time), month_key(name, now), used.month, until_next_month(now) + 1)
end

-- What clients are told.

function limit.duration(seconds)
    local milliseconds = math.max(math.ceil(seconds * 1000 - FORGIVEN), 0)
    if milliseconds < 1000 then
        return milliseconds .. "ms"
    end
    local minutes, rest = math.floor(milliseconds / 60000), milliseconds % 60000
    local hours = math.floor(minutes / 60)
    local text = hours > 0 and hours .. "h" .. minutes % 60 .. "m" or minutes > 0 and minutes .. "m" or ""
    return text .. rest / 1000 .. "s"
end

return limit
