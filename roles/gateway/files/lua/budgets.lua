-- What clients have used of their days and months, kept in a file: the dictionary that has it ends with Nginx, and a month does not.
--
-- Each line is a JSON list: client, day (since 1970), tokens of that day, tokens of that month. What was used since the last save is lost when the
-- host loses its power.
local cjson = require "cjson.safe"
local fleet = require "fleet"
local limit = require "limit"

local budgets = {}

local limits = ngx.shared.gateway_limits
local DAY = 86400
-- How many clients are looked at before requests get their turn.
local SLICE = 500

local file_name
local last_text = ""

local function has_budget(client)
    return client.tokens_per_day or client.tokens_per_month
end

-- init_by_lua: after a reload the dictionary has it all, and newer.
function budgets.load(name)
    file_name = name
    if not limits:add("budgets", true) then
        return
    end
    local file = io.open(file_name, "rb")
    if not file then
        return
    end
    for line in file:lines() do
        local entry = cjson.decode(line)
        if type(entry) == "table" and #entry == 4 then
            limit.restore(limits, entry[1], entry[2] * DAY, { day = entry[3], month = entry[4] }, ngx.time())
        end
    end
    file:close()
end

local function written(now, pause)
    local lines, looked = {}, 0
    for name, client in pairs(fleet.clients) do
        local used = has_budget(client) and limit.used(limits, name, now)
        if used and used.day + used.month > 0 then
            lines[#lines + 1] = cjson.encode({ name, math.floor(now / DAY), used.day, used.month }) .. "\n"
        end
        looked = looked + 1
        if pause and looked % SLICE == 0 then
            pause()
        end
    end
    return table.concat(lines)
end

-- In a timer with a pause; at the end of a worker, which cannot wait, without.
function budgets.save(pause)
    local text = written(ngx.time(), pause)
    if text == last_text then
        return
    end
    local aside = file_name .. "." .. ngx.worker.pid()
    local file, why = io.open(aside, "wb")
    if not file then
        ngx.log(ngx.ERR, "what clients have used cannot be kept: ", why)
        return
    end
    file:write(text)
    file:close()
    os.rename(aside, file_name)
    last_text = text
end

return budgets
