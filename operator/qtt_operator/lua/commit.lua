-- COMMIT: record the end of an attempt exactly once (done, fail, retry, cancel).
-- KEYS  log meta open done head top curve
-- ARGV  epoch, verb, c, to, the attempt that ended, job of the next attempt or "", field, value, …
-- Returns {word, stream id or ""}. Checks, in order: epoch, done, open, attempt.
local log, meta, open, done = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local head, top, curve = KEYS[5], KEYS[6], KEYS[7]
local epoch, verb, c, to = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local attempt, job = tonumber(ARGV[5]), ARGV[6]

if epoch < tonumber(redis.call('HGET', meta, 'epoch') or '0') then return {'STALE', ''} end

local configuration = string.match(c, '^%d+$')
local stem = (configuration and 'c' .. c or c) .. '-f'
local last_key = stem .. string.format('%d', to)
if redis.call('HEXISTS', done, last_key) == 1 then return {'DUP', ''} end

local raw = redis.call('HGET', open, c)
if not raw then return {'UNKNOWN', ''} end
local entry = cjson.decode(raw)
if entry.to ~= to then return {'UNKNOWN', ''} end
if entry.attempt ~= attempt then return {'OLDATTEMPT', ''} end

local fields, value = {}, {}
for i = 7, #ARGV do fields[#fields + 1] = ARGV[i] end
for i = 1, #fields, 2 do value[fields[i]] = fields[i + 1] end
local id = redis.call('XADD', log, '*', unpack(fields))
redis.call('HSET', meta, 'epoch', ARGV[1])

-- Integer milliseconds: sums of decimals would drift. Weights and evaluations cost the run nothing.
if configuration or c == 'prepare' then
  for field, counter in pairs({dev = 'charged_ms', ov = 'overhead_ms', q = 'queue_ms'}) do
    local ms = math.floor(tonumber(value[field] or '0') * 1000 + 0.5)
    redis.call('HINCRBY', meta, counter, string.format('%d', ms))
  end
end

if verb == 'retry' then
  entry.attempt, entry.since = attempt + 1, id
  if job ~= '' then entry.job = job end
  redis.call('HSET', open, c, cjson.encode(entry))
  redis.call('HINCRBY', meta, 'retries', 1)
  return {'OK', id}
end

redis.call('HDEL', open, c)
if verb == 'cancel' then
  redis.call('HINCRBY', meta, 'cancels', 1)
  return {'OK', id}
end

redis.call('HSET', done, last_key, id)
if verb == 'fail' then
  redis.call('HINCRBY', meta, 'fails', 1)
  redis.call('HINCRBY', meta, 'steps', 1)
  return {'OK', id}
end

local step = tonumber(redis.call('HGET', meta, 'step') or '1')
for target = entry.from + step, to - 1, step do
  redis.call('HSET', done, stem .. string.format('%d', target), id)
end

-- The head only rises: a gap that was trained again brings epochs it already holds.
local known = tonumber(redis.call('HGET', head, c) or '0')
local newest, best = known, nil
for _, row in ipairs(cjson.decode(value.epochs)) do
  if row[1] > known then redis.call('RPUSH', curve, cjson.encode(row)) end
  if row[1] > newest then newest = row[1] end
  if not best or row[2] > best then best = row[2] end
end
if newest > known then redis.call('HSET', head, c, string.format('%d', newest)) end
if best then redis.call('ZADD', top, 'GT', string.format('%.17g', best), c) end

-- A diverged result consumed every step up to and with the failed epoch, at least one.
local reached = to
if value.state == 'diverged' then
  reached = math.min(to, math.max(entry.from, newest) + 1)
end
redis.call('HINCRBY', meta, 'dones', 1)
redis.call('HINCRBY', meta, 'steps', string.format('%d', math.ceil((reached - entry.from) / step)))
return {'OK', id}
