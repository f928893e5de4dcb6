-- OPEN: record a decision before anything runs.
-- KEYS  log meta open done head cfg
-- ARGV  epoch, c, from, to, decision hash, reserved device-ms, job, config JSON or "", field, value, …
-- Returns {word, stream id or ""}. Checks, in order: epoch, closed, config, done, open, head.
local log, meta, open, done, head, cfg = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local epoch, c, from, to = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local decision, reserved, job, config = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8]

if epoch < tonumber(redis.call('HGET', meta, 'epoch') or '0') then return {'STALE', ''} end

local closed = redis.call('HGET', meta, 'closed') or ''
if closed ~= '' and string.sub(c, 1, 5) ~= 'eval-' then return {'CLOSED', ''} end

if config ~= '' then
  local known = redis.call('HGET', cfg, c)
  if known and known ~= config then return {'CONFLICT', ''} end
end

-- A step key is a configuration and an absolute target epoch: c12-f3, prepare-f1.
local stem = (string.match(c, '^%d+$') and 'c' .. c or c) .. '-f'
local step = tonumber(redis.call('HGET', meta, 'step') or '1')
for target = from + step, to - 1, step do
  if redis.call('HEXISTS', done, stem .. string.format('%d', target)) == 1 then return {'DONE', ''} end
end
if redis.call('HEXISTS', done, stem .. string.format('%d', to)) == 1 then return {'DONE', ''} end

if redis.call('HEXISTS', open, c) == 1 then return {'BUSY', ''} end
if from ~= tonumber(redis.call('HGET', head, c) or '0') then return {'GAP', ''} end

local fields = {}
for i = 9, #ARGV do fields[#fields + 1] = ARGV[i] end
local id = redis.call('XADD', log, '*', unpack(fields))
if config ~= '' then redis.call('HSETNX', cfg, c, config) end
local attempt = 0
for i = 1, #fields, 2 do if fields[i] == 'a' then attempt = tonumber(fields[i + 1]) end end
redis.call('HSET', open, c, cjson.encode({
  from = from, to = to, attempt = attempt, job = job, reserved = reserved, since = id,
  decision = decision,
}))
redis.call('HINCRBY', meta, 'opens', 1)
redis.call('HSET', meta, 'epoch', ARGV[1])
return {'OK', id}
