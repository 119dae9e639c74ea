return { rate = function() return true, 1, 1 end, enter = function() return true end, leave = function() end, sweep = function() end }
