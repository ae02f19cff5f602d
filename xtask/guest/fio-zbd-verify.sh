# fio writes zones, sequentially and at random, and reads everything back with checksums.
common=(--filename="$DEV" --direct=1 --zonemode=zbd --ioengine=libaio --iodepth=8 --verify=crc32c
	--max_open_zones="$MAX_OPEN" --group_reporting --eta=never --minimal)
for run in "seq write 128k" "seq-4k write 4k" "random randwrite 16k" "random-64k randwrite 64k"; do
	read -r name rw bs <<<"$run"
	size=$((SIZE_MB / 4))M
	[ "$bs" = 4k ] && size=16M
	echo "guest# fio --rw=$rw --bs=$bs --zonemode=zbd --verify=crc32c --size=$size"
	run blkzone reset "$DEV"
	fio --name="$name" --rw="$rw" --bs="$bs" --size="$size" "${common[@]}" >/tmp/out 2>&1 ||
		{ cat /tmp/out; fail "$name"; }
	grep -iE 'error|bad|verify:' /tmp/out && fail "$name: fio complains"
	expect "$name: written zones, at least one" 1 "$(blkzone report "$DEV" | grep -qv '(em)' && echo 1)"
done
echo "== four jobs at once, each in zones of its own"
run blkzone reset "$DEV"
for job in 0 1 2 3; do
	echo "[j$job]"
	echo "offset=$((job * SIZE_MB / 4))M"
done >/tmp/jobs
run fio --filename="$DEV" --direct=1 --zonemode=zbd --ioengine=libaio --iodepth=4 --verify=crc32c --rw=randwrite --bs=32k \
	--size=$((SIZE_MB / 4))M --io_size=24M --max_open_zones=2 --eta=never --minimal --output=/tmp/out /tmp/jobs
grep -iE 'error|bad|verify:' /tmp/out && fail "fio complains"
exit 0
