-- What this gateway is and does, for whoever looks after it: as JSON, and as a page made of the same.
local cjson = require "cjson.safe"
local fleet = require "fleet"
local page = require "page"
local state = require "state"

local status = {}

-- The checks write every 5 s, and sooner what is new.
local STALE_SECONDS = 30
-- A certificate that has not been renewed by then will not be by itself.
local FEW_DAYS = 14
local DAY = 86400
local NO_STATE = "the checks have said nothing since this host started: every backend is used"
local UNREADABLE = "what the checks wrote last cannot be read any more"
local UNKNOWN = "the checks do not know it yet"
local CERTIFICATES = { tls = "certificate for clients", fleet = "certificate of the fleet" }
-- Nothing from anywhere, and no script, whatever comes into the page.
local POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

local template, program

-- When Nginx reads its configuration.
function status.load(page_file, program_id)
    local file = assert(io.open(page_file, "rb"))
    template, program = page.compile(file:read("*a")), program_id
    file:close()
end

-- After so many routes others have a turn: streams go on.
local SLICE = 20
local function each_route(routes, make)
    local made = {}
    for position, route in ipairs(routes) do
        made[position] = make(route)
        if position % SLICE == 0 then
            ngx.sleep(0.001)
        end
    end
    return made
end

-- What is known

local function backend_of(backend, told)
    local said = told and (told.backends[backend.id] or { why = UNKNOWN }) or { why = state.age() and UNREADABLE or NO_STATE }
    return {
        id = backend.id, host = backend.host, instance = backend.instance,
        use = state.used(backend.id), why = said.why or "", since = tonumber(said.since) or 0,
        check = said.check or "new", operator = said.operator or "up", leaving = said.leaving == true, kept = said.kept == true,
        in_flight = state.in_flight_of(backend.id), most_requests = backend.most_requests,
    }
end

local function route_of(route, told)
    local backends, used = {}, 0
    for position, backend in ipairs(route.backends) do
        backends[position] = backend_of(backend, told)
        used = used + (backends[position].use and 1 or 0)
    end
    return {
        model = route.model, aliases = route.aliases, instance = route.instance, weight = route.weight, balance = route.balance,
        min_available = route.min_available, used = used, backends = backends,
    }
end

local function certificates(now)
    local found = {}
    for _, name in ipairs(state.CERTIFICATES) do
        local time = state.not_after(name)
        found[name] = time and { not_after = time, days_left = math.floor((time - now) / DAY) }
    end
    return found
end

-- What somebody should look at, in words.
local function problems(data)
    local list = {}
    local function add(text, ...)
        list[#list + 1] = text:format(...)
    end
    if data.state.stale then
        add("The checks have written nothing for %d seconds; the backends are used as they said last.", data.state.age_seconds)
    elseif not data.state.age_seconds then
        add("The checks have said nothing since this host started; every backend is used.")
    end
    for _, route in ipairs(data.routes) do
        local out = #route.backends - route.used
        if route.used == 0 then
            add("%s (%s) has no backend in use.", route.model, route.instance)
        elseif out > 0 then
            add("%s (%s): %d of %d backends not in use.", route.model, route.instance, out, #route.backends)
        end
    end
    for _, name in ipairs(state.CERTIFICATES) do
        local days = data.certificates[name] and data.certificates[name].days_left
        if days and days < 0 then
            add("The %s has expired.", CERTIFICATES[name])
        elseif days and days < FEW_DAYS then
            add("The %s expires in %d days.", CERTIFICATES[name], days)
        end
    end
    return list
end

local function data_of(now)
    local told, age = state.told(), state.age()
    local data = {
        gateway = fleet.gateway, time = now, configuration = fleet.id, configuration_since = fleet.loaded, program = program,
        state = { serial = state.in_flight().serial, age_seconds = age, stale = age ~= nil and age > STALE_SECONDS },
        workers = state.workers(), certificates = certificates(now),
        routes = each_route(fleet.routes, function(route) return route_of(route, told) end),
    }
    data.problems = problems(data)
    return data
end

-- How it is said

local function counted(number, word)
    return ("%d %s%s"):format(number, word, number == 1 and "" or "s")
end

local function span(seconds)
    seconds = math.max(0, seconds)
    if seconds < 60 then
        return ("%d s"):format(seconds)
    elseif seconds < 3600 then
        return ("%d min"):format(seconds / 60)
    elseif seconds < 2 * DAY then
        return ("%d h"):format(seconds / 3600)
    end
    return ("%d days"):format(seconds / DAY)
end

local function moment(time)
    return os.date("!%Y-%m-%d %H:%M:%S UTC", time)
end

-- A time, and how long ago it was.
local function point(time, now)
    if not time or time == 0 then
        return { utc = "", ago = "not known" }
    end
    return { utc = moment(time), ago = span(now - time) .. " ago" }
end

local function said_of_leaving(backend)
    if backend.kept then
        return "kept"
    end
    return backend.leaving and "wants to" or "no"
end

local function row_of(backend, now)
    local since = point(backend.since, now)
    return {
        id = backend.id, use = backend.use and "in use" or "not in use", tone = backend.use and "good" or "bad",
        why = backend.why, utc = since.utc, ago = since.ago,
        check = backend.check, checktone = backend.check == "failed" and "bad" or "plain",
        operator = backend.operator, operatortone = backend.operator == "up" and "plain" or "warn",
        leaving = said_of_leaving(backend), leavingtone = (backend.leaving or backend.kept) and "warn" or "plain",
        inflight = backend.most_requests and ("%d of %d"):format(backend.in_flight, backend.most_requests) or backend.in_flight,
    }
end

local function section_of(route, now)
    local notes = {
        ("instance %s"):format(route.instance),
        ("%d of %s in use"):format(route.used, counted(#route.backends, "backend")),
        route.min_available and route.min_available > 0 and ("at least %d kept"):format(route.min_available) or nil,
    }
    if route.weight ~= 1 then
        notes[#notes + 1] = ("weight %s"):format(route.weight)
    end
    if route.balance ~= "least" then
        notes[#notes + 1] = ("by %s"):format(route.balance)
    end
    if #route.aliases > 0 then
        notes[#notes + 1] = "also " .. table.concat(route.aliases, ", ")
    end
    local rows = {}
    for position, backend in ipairs(route.backends) do
        rows[position] = row_of(backend, now)
    end
    return { model = route.model, notes = table.concat(notes, " · "), backends = rows }
end

local function said_of_state(told)
    if not told.age_seconds then
        return { text = "none since this host started", tone = "warn" }
    elseif told.stale then
        return { text = ("serial %d, stale: written %s ago"):format(told.serial, span(told.age_seconds)), tone = "bad" }
    end
    return { text = ("serial %d, written %s ago"):format(told.serial, span(told.age_seconds)), tone = "plain" }
end

local function said_of_certificate(certificate)
    if not certificate then
        return { text = "not known", tone = "plain" }
    end
    local days = certificate.days_left
    local left = days < 0 and "expired" or counted(days, "day") .. " left"
    return {
        text = ("%s (%s %s)"):format(left, days < 0 and "on" or "until", moment(certificate.not_after)),
        tone = days < 0 and "bad" or days < FEW_DAYS and "warn" or "plain",
    }
end

local function view_of(data)
    local now = data.time
    local told, tls, of_fleet = said_of_state(data.state), said_of_certificate(data.certificates.tls), said_of_certificate(data.certificates.fleet)
    local view = {
        gateway = data.gateway, time = moment(now), configuration = data.configuration, program = data.program,
        loaded = point(data.configuration_since, now).ago, state = told.text, statetone = told.tone,
        tls = tls.text, tlstone = tls.tone, fleet = of_fleet.text, fleettone = of_fleet.tone,
        workers = counted(data.workers.all - data.workers.old, "worker"),
        oldworkers = data.workers.old == 0 and "none of former configurations"
            or data.workers.old .. " of former configurations, which end their requests",
        verdict = #data.problems == 0 and "All is well: every backend is in use." or counted(#data.problems, "thing") .. " to look at",
        verdicttone = #data.problems == 0 and "good" or "warn", problems = {},
        routes = each_route(data.routes, function(route) return section_of(route, now) end),
    }
    for position, text in ipairs(data.problems) do
        view.problems[position] = { text = text }
    end
    return view
end

local function begin(kind)
    ngx.header["Content-Type"] = kind
    ngx.header["Cache-Control"] = "no-store"
    ngx.header["X-Content-Type-Options"] = "nosniff"
    ngx.header["Content-Security-Policy"] = POLICY
    ngx.header["Referrer-Policy"] = "no-referrer"
end

-- cjson writes an empty list as {}; within a text the quotes before it would be escaped.
local function encoded(value)
    return (cjson.encode(value):gsub('"(%l+)":{}', function(name)
        return name ~= "certificates" and '"' .. name .. '":[]' or nil
    end))
end

function status.json()
    begin("application/json")
    local data = data_of(ngx.now())
    local routes = table.concat(each_route(data.routes, encoded), ",")
    data.routes = nil
    ngx.print(encoded(data):sub(1, -2), ',"routes":[', routes, "]}")
end

function status.page()
    begin("text/html; charset=utf-8")
    page.render(template, view_of(data_of(ngx.now())), ngx.print, function()
        ngx.flush(true)
        ngx.sleep(0.001)
    end)
end

return status
