-- LIFETIME: let a run's keys expire, keep them, or delete them now.
-- KEYS  meta, then every other key of the run
-- ARGV  epoch, seconds; 0 = delete now, -1 = keep
-- Returns {word, ""}. Checks: epoch.
if tonumber(ARGV[1]) < tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') then
  return {'STALE', ''}
end
local seconds = tonumber(ARGV[2])
for i = 1, #KEYS do
  if seconds == 0 then
    redis.call('UNLINK', KEYS[i])
  elseif seconds < 0 then
    redis.call('PERSIST', KEYS[i])
  else
    redis.call('EXPIRE', KEYS[i], string.format('%d', seconds))
  end
end
return {'OK', ''}
