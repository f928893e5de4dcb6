-- NOTE: record what is no step, once per deduplication key (run, prepared, weights, note, close, reopen).
-- KEYS  log meta open done head
-- ARGV  epoch, kind, key, pseudo-configuration it ends or "", to, attempt, facts for meta as a JSON
--       object, field, value, …
-- Returns {word, stream id or ""}. Checks, in order: epoch, key, of a close: the event it rests on (its key names
-- it) was not lost, and of a pseudo-configuration: open, attempt.
local log, meta, open, done, head = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local epoch, kind, key, c = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local to, attempt, facts = tonumber(ARGV[5]), tonumber(ARGV[6]), cjson.decode(ARGV[7])

if epoch < tonumber(redis.call('HGET', meta, 'epoch') or '0') then return {'STALE', ''} end
if redis.call('HEXISTS', done, key) == 1 then return {'DUP', ''} end
local rests_on = kind == 'close' and string.match(key, '^close%-(%d+%-%d+)$')
if rests_on and #redis.call('XRANGE', log, rests_on, rests_on) == 0 then return {'UNKNOWN', ''} end
if c ~= '' then
  local raw = redis.call('HGET', open, c)
  if not raw then return {'UNKNOWN', ''} end
  local entry = cjson.decode(raw)
  if entry.to ~= to then return {'UNKNOWN', ''} end
  if entry.attempt ~= attempt then return {'OLDATTEMPT', ''} end
end

local fields, value = {}, {}
for i = 8, #ARGV do fields[#fields + 1] = ARGV[i] end
for i = 1, #fields, 2 do value[fields[i]] = fields[i + 1] end
local id = redis.call('XADD', log, '*', unpack(fields))
redis.call('HSET', done, key, id)
redis.call('HSET', meta, 'epoch', ARGV[1])
for name, fact in pairs(facts) do redis.call('HSET', meta, name, fact) end

if c ~= '' then
  redis.call('HDEL', open, c)
  redis.call('HSET', head, c, string.format('%d', to))
  redis.call('HSET', done, c .. '-f' .. string.format('%d', to), id)
end
if kind == 'prepared' then
  local ms = math.floor(tonumber(value.dev or '0') * 1000 + 0.5)
  redis.call('HINCRBY', meta, 'charged_ms', string.format('%d', ms))
elseif kind == 'close' then
  redis.call('HSET', meta, 'closed', value.reason)
elseif kind == 'reopen' then
  redis.call('HSET', meta, 'closed', '')
elseif kind == 'run' then
  redis.call('HSET', meta, 'createdAt', string.match(id, '^%d+'))
end
return {'OK', id}
