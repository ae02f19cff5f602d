# An NVMe controller with a zoned namespace and one without: found, described, written and verified.
find_nvme 2
[ -n "$DEV" ] && [ -n "$PLAIN" ] || fail "not one zoned and one plain namespace"

run nvme list
run nvme id-ctrl /dev/nvme0
run nvme zns id-ns "$DEV"
run nvme zns report-zones "$DEV" -d 4
expect "zones in the report" $((SIZE_MB / ZONE_MB)) "$(nvme zns report-zones "$DEV" -o json | jq .nr_zones)"
expect "empty zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | grep -c '(em)')"
expect "open limit" "$MAX_OPEN" "$(lsblk -dnr -z -o ZONE-OMAX "$DEV")"

echo "== zone management"
run nvme zns open-zone "$DEV" -s 0
expect "zone 0" "0 oe" "$(zone 0)"
run nvme zns finish-zone "$DEV" -s 0
case "$(zone 0)" in *" fu") echo "ok: zone 0 is full" ;; *) fail "zone 0 is $(zone 0)" ;; esac
run nvme zns reset-zone "$DEV" -s 0
expect "zone 0" "0 em" "$(zone 0)"
head -c 8k /dev/urandom >/tmp/8k
run nvme zns zone-append "$DEV" -s 0 -z 8192 -d /tmp/8k
expect "zone 0" "16 oi" "$(zone 0)"
run cmp /tmp/8k <(get 0 0 8k)
refuse put /tmp/8k 1 8192
run blkzone reset "$DEV"

echo "== fio on both, at the same time, deep and verified"
run fio --output-format=terse --output=/tmp/out --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 \
	--name=zoned --filename="$DEV" --zonemode=zbd --rw=write --bs=64k --size=48M --max_open_zones="$MAX_OPEN" \
	--name=plain --filename="$PLAIN" --rw=randwrite --bs=4k --size=16M
expect "full zones" 3 "$(blkzone report "$DEV" | grep -c '(fu)')"

echo "== the controller is reset, and goes on"
run nvme reset /dev/nvme0
run dd if="$PLAIN" of=/dev/null bs=64k count=16 iflag=direct status=none
grep nvme0q /proc/interrupts
expect "kernel's complaints" 0 "$(dmesg | grep -c 'nvme.*timeout')"
