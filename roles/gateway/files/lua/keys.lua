-- Keys of a shared dictionary, by the name of what they are about. Each is made once: requests look at many, and to put texts together costs more
-- than to look.
--
--   keys(prefix, suffix)   a table that has prefix .. name .. suffix for every name
return function(prefix, suffix)
    return setmetatable({}, { __index = function(made, name)
        local key = prefix .. name .. (suffix or "")
        made[name] = key
        return key
    end })
end
