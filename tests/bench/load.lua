-- wrk's side of tests/bench/load.py: every request has a text of its own, in order, from a file of JSON strings.
-- Arguments: the texts' file; a file of "path<tab>before<tab>after" lines, a request a line for each text; where to begin.
-- Prints one line: counts, percentiles in microseconds, and when each answer came, in microseconds.

local ffi = require("ffi")
ffi.cdef("typedef struct { long s; long ns; } moment; int clock_gettime(int, moment *);")
local moment = ffi.new("moment")
local bodies, at = {}, 0
local threads = {}
arrivals = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local calls = {}
  for line in io.lines(args[2]) do
    local path, before, after = line:match("^(.-)\t(.-)\t(.*)$")
    table.insert(calls, { path = path, before = before, after = after })
  end
  local headers = { ["Content-Type"] = "application/json" }
  for text in io.lines(args[1]) do
    for _, call in ipairs(calls) do
      table.insert(bodies, wrk.format("POST", call.path, headers, call.before .. text .. call.after))
    end
  end
  at = tonumber(args[3]) * #calls % #bodies
end

function request()
  at = at % #bodies + 1
  return bodies[at]
end

function response()
  ffi.C.clock_gettime(1, moment)
  arrivals[#arrivals + 1] = tonumber(moment.s) * 1e6 + tonumber(moment.ns) / 1e3
end

function done(summary, latency)
  local errors = summary.errors
  local sockets = errors.connect + errors.read + errors.write + errors.timeout
  local times = threads[1]:get("arrivals")
  for i = #times, 1, -1 do
    times[i] = string.format("%.0f", times[i] - times[1])
  end
  io.write(string.format(
    'manifold {"answers": %d, "refused": %d, "lost": %d, "p50_us": %d, "p95_us": %d, "p99_us": %d, "arrivals_us": [%s]}\n',
    summary.requests, errors.status, sockets,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), table.concat(times, ", ")
  ))
end
