-- SNAP: keep the optimizer's state as of a stream id, and the generation before it.
-- KEYS  meta log snap
-- ARGV  epoch, stream id, code version, SHA-256 of the data, base64 text
-- Returns {word, ""}. Checks, in order: epoch, id at most the newest event's.
local meta, log, snap = KEYS[1], KEYS[2], KEYS[3]

if tonumber(ARGV[1]) < tonumber(redis.call('HGET', meta, 'epoch') or '0') then
  return {'STALE', ''}
end

-- Ids are compared by their two numbers; as text "9-0" would come after "10-0".
local newest = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)
if #newest == 0 then return {'UNKNOWN', ''} end
local ms, seq = string.match(ARGV[2], '^(%d+)-(%d+)$')
local last_ms, last_seq = string.match(newest[1][1], '^(%d+)-(%d+)$')
ms, seq, last_ms, last_seq = tonumber(ms), tonumber(seq), tonumber(last_ms), tonumber(last_seq)
if ms > last_ms or (ms == last_ms and seq > last_seq) then return {'UNKNOWN', ''} end

redis.call('HSET', meta, 'epoch', ARGV[1])
for _, name in ipairs({'streamId', 'codeVersion', 'sha256', 'data'}) do
  local old = redis.call('HGET', snap, name)
  if old then redis.call('HSET', snap, 'previous.' .. name, old) end
end
redis.call('HSET', snap, 'streamId', ARGV[2], 'codeVersion', ARGV[3], 'sha256', ARGV[4], 'data', ARGV[5])
return {'OK', ''}
