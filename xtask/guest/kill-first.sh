# Writes until the daemon is killed. Two writers: one notes on the host each block that the drive
# acknowledged; fio, in the upper half of the zones, writes blocks that carry their own checksums.
zones=$((SIZE_MB / ZONE_MB))
head -c 4M /dev/urandom >/share/pattern
cp /share/pattern /tmp/pattern
fio --name=upper --filename="$DEV" --direct=1 --zonemode=zbd --ioengine=libaio --iodepth=8 --rw=randwrite --bs=64k \
	--offset=$((SIZE_MB / 2))M --size=$((SIZE_MB / 2))M --max_open_zones=$((MAX_OPEN - 2)) --time_based --runtime=600 \
	--verify=crc32c --verify_interval=4k --do_verify=0 --eta=never >/share/fio.log 2>&1 &
: >/share/acknowledged
per_zone=$((ZONE_MB * 16)) # blocks of 64 KiB
for ((i = 0; i < zones / 2 * per_zone; i++)); do
	dd if=/tmp/pattern of="$DEV" bs=64k count=1 skip=$((i * 37 % 64)) seek=$((i)) oflag=direct conv=notrunc status=none || break
	echo $i >>/share/acknowledged
	[ $((i % 50)) = 49 ] && echo "acknowledged $((i + 1)) blocks"
done
wait
