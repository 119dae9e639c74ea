-- Pages in HTML from a template and values.
--
--   {{name}}                  the value of that name; whatever is in it, it is text and no HTML
--   <each name>...</each name>   what is between, once for each table of the list of that name, which has the values there
--
--   compile(text)                       the template, or an error
--   render(template, values, write, pause)   calls write(text) for some lines of lists at a time, and pause() in between
local page = {}

local SLICE = 50
local ESCAPES = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&#39;" }

local function compile_values(parts, text)
    local from = 1
    for before, name, after in text:gmatch("()%{%{(%w+)%}%}()") do
        parts[#parts + 1] = text:sub(from, before - 1)
        parts[#parts + 1] = { value = name }
        from = after
    end
    parts[#parts + 1] = text:sub(from)
end

-- A list of texts, {value = name} and {each = name, parts = ...}.
function page.compile(text)
    local parts, from = {}, 1
    for before, name, inner, after in text:gmatch("()<each (%w+)>(.-)</each %2>()") do
        compile_values(parts, text:sub(from, before - 1))
        parts[#parts + 1] = { each = name, parts = page.compile(inner) }
        from = after
    end
    local rest = text:sub(from)
    assert(not rest:find("</?each "), "an <each> that has no end, or no beginning")
    compile_values(parts, rest)
    return parts
end

local function escaped(value)
    return (tostring(value):gsub("[&<>\"']", ESCAPES))
end

local function put(out, parts, values)
    for _, part in ipairs(parts) do
        if type(part) == "string" then
            out[#out + 1] = part
        elseif part.value then
            assert(values[part.value] ~= nil, part.value)
            out[#out + 1] = escaped(values[part.value])
        else
            for _, one in ipairs(values[part.each]) do
                put(out, part.parts, one)
                out.rows = out.rows + 1
                if out.rows % SLICE == 0 then
                    out.write(table.concat(out))
                    for index = #out, 1, -1 do
                        out[index] = nil
                    end
                    out.pause()
                end
            end
        end
    end
end

function page.render(template, values, write, pause)
    local out = { rows = 0, write = write, pause = pause }
    put(out, template, values)
    write(table.concat(out))
end

return page
