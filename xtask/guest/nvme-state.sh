# Two NVMe drives with zones, zbdkit's and QEMU's own. PART: bring their zones into every condition; look what a restart
# left of it, and change some; look again.
find_nvme 1 "QEMU NVMe Ctrl"
QEMU=$DEV
find_nvme 1
OURS=$DEV
nvme() { command nvme "$@" >/tmp/said 2>&1 || fail "nvme $*: $(cat /tmp/said)"; }
lba() { echo $(($1 * ZONE_MB * 256)); }

# extension: what zone 9 of DEV has for one.
extension() { command nvme zns report-zones "$DEV" -s "$(lba 9)" -d 1 -e -o binary | tail -c 64; }

# make: zones of DEV in the conditions that a host can bring about.
make() {
	local z
	run put /share/3M 0 0
	run put /share/20k 1 0
	nvme zns open-zone "$DEV" -s "$(lba 2)"
	run put /share/20k 2 0
	run put /share/20k 3 0
	nvme zns close-zone "$DEV" -s "$(lba 3)"
	run put /share/20k 4 0
	nvme zns finish-zone "$DEV" -s "$(lba 4)"
	nvme zns finish-zone "$DEV" -s "$(lba 5)"
	nvme zns open-zone "$DEV" -s "$(lba 6)"
	nvme zns open-zone "$DEV" -s "$(lba 7)"
	nvme zns close-zone "$DEV" -s "$(lba 7)"
	run put /share/20k 8 0
	nvme zns reset-zone "$DEV" -s "$(lba 8)"
	nvme zns set-zone-desc "$DEV" -s "$(lba 9)" -d /share/extension
	for z in 14 15; do run put /share/20k $z 0; done
	sync "$DEV"
	for ((z = 0; z < SIZE_MB / ZONE_MB; z++)); do echo "$z $(zone $z)"; done
}

case $PART in
make)
	head -c 3M /dev/urandom >/share/3M
	head -c 20k /dev/urandom >/share/20k
	printf '%-64s' "an extension" >/share/extension
	for name in zbdkit qemu; do
		echo "== $name's zones are made"
		DEV=$OURS
		[ $name = zbdkit ] || DEV=$QEMU
		make >/tmp/made || { cat /tmp/made; fail "$name's zones cannot be made"; }
		grep -E '^[0-9]+ [0-9]+ ..$' /tmp/made | tee /share/$name-made
	done
	# As they come back: no zone is open, and one that was never written is empty, but for the one with an extension.
	sed -E 's/ o[ie]$/ cl/; /^9/! s/ 0 cl$/ 0 em/; s/^14 .*/14 40 ro/; s/^15 .*/15 40 of/' /share/zbdkit-made >/share/expected
	expect "zones" 16 "$(wc -l </share/expected)"
	;;
look | again)
	DEV=$OURS
	zones >/tmp/zones
	cat /tmp/zones
	echo "== zbdkit: every zone is as it was"
	# A report of a zone that cannot be written has no pointer to show.
	run diff <(sed -E 's/ -?[0-9]+ (ro|of|fu)$/ \1/' /share/expected) <(sed -E 's/ -?[0-9]+ (ro|of|fu)$/ \1/' /tmp/zones)
	run cmp /share/3M <(get 0 0 3M)
	run cmp /share/extension <(extension)
	for z in 1 2 3 14; do run cmp /share/20k <(get $z 0 20k); done
	if [ $PART = look ]; then
		run cmp /share/20k <(get 4 0 20k)
	else
		run cmp /share/20k <(get 1 20480 20k)
		unwritten 4 0 20k
	fi
	unwritten 4 20480 4k
	unwritten 8 0 20k
	if [ $PART = look ]; then
		echo "== and goes on"
		run put /share/20k 1 20480
		nvme zns reset-zone "$DEV" -s "$(lba 4)"
		nvme zns finish-zone "$DEV" -s "$(lba 3)"
		sed -i -E 's/^1 40 cl/1 80 cl/; s/^4 .*/4 0 em/; s/^3 .*/3 0 fu/' /share/expected
	fi
	# Last, since the kernel wants a report after a write that failed.
	refuse get 15 0 4k
	refuse put /share/20k 14 20480
	refuse put /share/20k 1 0
	echo "== QEMU's nvme-ns: the data is there, its zones are not"
	DEV=$QEMU
	expect "empty zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | grep -c '(em)')"
	run cmp /share/3M <(get 0 0 3M)
	refuse cmp /share/extension <(extension)
	;;
esac
exit 0
