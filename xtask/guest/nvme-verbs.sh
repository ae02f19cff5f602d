# The same commands to two NVMe controllers, zbdkit's and QEMU's own, each with a zoned and a plain namespace. What each says
# goes to /share/zbdkit and /share/qemu, without what can never be the same: names, serial numbers, counts of time.

# say COMMAND...: shows a command, what it says, and its status where it is not 0.
say() {
	local said status
	echo "\$ $*" | names
	said=$("$@" 2>&1 </dev/null)
	status=$?
	echo "$said" | names | sed -E 's/[[:space:]]+$//; /^$/d'
	[ $status = 0 ] || echo "status $status"
}

names() { sed -E "s#$DEV#ZONED#g; s#$PLAIN#PLAIN#g; s#/dev/ng${DEV#/dev/nvme}#ZONED#g; s#$NVME#CTRL#g; s#\b${NVME#/dev/}\b#CTRL#g"; }

# fields FILTER COMMAND...: like say, for a command that answers in JSON: a line a field, without those that match FILTER.
fields() {
	local filter=$1
	shift
	echo "\$ $*" | names
	"$@" -o json 2>&1 </dev/null >json || { names <json; return; }
	jq -r 'paths(scalars) as $p | "\($p | map(tostring) | join(".")): \(getpath($p))"' json 2>&1 | grep -vE "$filter" | names
}

# does COMMAND...: what must work on both, and is not shown.
does() { "$@" >does 2>&1 </dev/null || echo "FAILED: $* $(cat does)" | names; }

lba() { echo $(($1 * ZONE_MB * 256)); }
# state ZONE: as the drive reports it.
state() { nvme zns report-zones "$DEV" -s "$(lba "$1")" -d 1 | sed -n 's/^SLBA: //p'; }
# zsend ZONE ACTION [ALL]: Zone Management Send.
zsend() { say nvme io-passthru "$DEV" --opcode=0x79 --namespace-id=1 --cdw10="$1" --cdw13="$2"; }
# write ZONE OFFSET BLOCKS: writes, in blocks.
write() { nvme write "$DEV" -s $(($(lba "$1") + $2)) -c $(($3 - 1)) -z $(($3 * 4096)) -d 1M; }
append() { nvme zns zone-append "$DEV" -s "$(lba "$1")" -z $(($2 * 4096)) -d 1M; }
# prepare CONDITION: zone 3 in that condition.
prepare() {
	does nvme zns reset-zone "$DEV" -s "$(lba 3)"
	case $1 in
	implicitly-open) does write 3 0 1 ;;
	explicitly-open) does nvme zns open-zone "$DEV" -s "$(lba 3)" ;;
	closed)
		does write 3 0 1
		does nvme zns close-zone "$DEV" -s "$(lba 3)"
		;;
	closed-empty)
		does nvme zns open-zone "$DEV" -s "$(lba 3)"
		does nvme zns close-zone "$DEV" -s "$(lba 3)"
		;;
	full) does nvme zns finish-zone "$DEV" -s "$(lba 3)" ;;
	esac
}

descriptions() {
	echo "## descriptions"
	fields '^(vid|ssvid|sn|mn|fr|ieee|subnqn|cntlid|psds)' nvme id-ctrl "$NVME"
	fields '^$' nvme zns id-ctrl "$NVME"
	fields '^(nguid|eui64)' nvme id-ns "$DEV"
	fields '^(nguid|eui64)' nvme id-ns "$PLAIN"
	fields '^$' nvme zns id-ns "$DEV"
	fields '^$' nvme cmdset-ind-id-ns "$DEV"
	fields '^$' nvme nvm-id-ctrl "$NVME"
	say nvme list-ns "$NVME"
	say nvme list-ns "$NVME" --csi=2
	say nvme list-ns "$NVME" --all
	say nvme list-ctrl "$NVME"
	say nvme id-iocs "$NVME"
	say nvme id-ns "$NVME" -n 9
	say nvme id-ns "$NVME" -n 0xffffffff
	say nvme admin-passthru "$NVME" --opcode=6 --cdw10=0x7f --data-len=4096 -r
	say nvme admin-passthru "$NVME" --opcode=0x7e
	say nvme zns id-ns "$PLAIN"
}

conditions() {
	local condition verb
	echo "## every action in every condition"
	for condition in empty implicitly-open explicitly-open closed closed-empty full; do
		for verb in open close finish reset offline; do
			prepare $condition
			echo "\$ # $condition, $verb"
			nvme zns $verb-zone "$DEV" -s "$(lba 3)" 2>&1 | sed 's/^zns-[^:]*: //' | names
			state 3
		done
	done
	does nvme zns reset-zone "$DEV" -a
}

reports() {
	local filter
	echo "## reports"
	does write 0 0 256
	does write 0 256 256
	does write 0 512 256
	does write 1 0 3
	does nvme zns open-zone "$DEV" -s "$(lba 2)"
	does write 3 0 5
	does nvme zns close-zone "$DEV" -s "$(lba 3)"
	does nvme zns finish-zone "$DEV" -s "$(lba 4)"
	does write 15 0 1
	for filter in 0 1 2 3 4 5 6 7; do say nvme zns report-zones "$DEV" -S $filter; done
	say nvme zns report-zones "$DEV" -S 8
	say nvme zns report-zones "$DEV" -d 2
	say nvme zns report-zones "$DEV" -d 2 -p
	say nvme zns report-zones "$DEV" -s $(($(lba 14) + 5)) -d 4 -p
	say nvme zns report-zones "$DEV" -s "$(lba 16)" -d 1
	say nvme zns report-zones "$DEV" -e -d 1
	# Zone Management Receive as nvme-cli does not send it: partial and short, nothing but a header, less than one, unknown.
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=256 -r --cdw12=63 --cdw13=0x10000
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=64 -r --cdw12=15
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=64 -r --cdw12=15 --cdw13=0x10000
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=32 -r --cdw12=7
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=128 -r --cdw12=31 --cdw13=0x5
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=128 -r --cdw12=31 --cdw13=0x1
	say nvme io-passthru "$DEV" --opcode=0x7a --namespace-id=1 --data-len=128 -r --cdw12=31 --cdw13=0x900
	say nvme zns report-zones "$PLAIN" -d 1
}

mistakes() {
	local z
	echo "## mistakes"
	does nvme zns reset-zone "$DEV" -a
	say write 0 1 1
	say write 0 -1 1
	say nvme write "$DEV" -s "$(lba 16)" -c 0 -z 4096 -d 1M
	say nvme read "$DEV" -s "$(lba 16)" -c 0 -z 4096 -d read
	does write 0 0 256
	does write 0 256 256
	does write 0 512 255
	say write 0 767 2
	say append 0 2
	say append 0 1
	say write 0 768 1
	say append 0 1
	state 0
	say nvme zns zone-append "$DEV" -s $(($(lba 1) + 1)) -z 4096 -d 1M
	say nvme zns zone-append "$PLAIN" -s 0 -z 4096 -d 1M
	say nvme zns open-zone "$PLAIN" -s 0
	# Reads: past the pointer, past the capacity, across the end of a zone, across it into an empty one.
	say nvme read "$DEV" -s $(($(lba 1) + 9)) -c 0 -z 4096 -d read
	echo "zeros: $(head -c 4096 read | tr -dc '\000' | wc -c)"
	say nvme read "$DEV" -s 760 -c 15 -z 65536 -d read
	say nvme read "$DEV" -s $(($(lba 1) - 1)) -c 1 -z 8192 -d read
	say nvme verify "$DEV" -s $(($(lba 1) - 1)) -c 1
	# Zone Management Send: not a zone's start, unknown, reserved, beyond the end, and what has no option.
	zsend 5 1
	zsend 0 0
	zsend 0 7
	zsend 0 0x10
	zsend 0 0x11
	zsend 0 0x110
	zsend 0 0x111
	zsend "$(lba 16)" 4
	zsend "$(lba 5)" 0x203
	echo "## limits"
	does nvme zns reset-zone "$DEV" -a
	for z in 0 1 2 3; do does nvme zns open-zone "$DEV" -s "$(lba $z)"; done
	say nvme zns open-zone "$DEV" -s "$(lba 4)"
	say write 4 0 1
	say append 4 1
	does nvme zns close-zone "$DEV" -s "$(lba 0)"
	does nvme zns close-zone "$DEV" -s "$(lba 1)"
	does write 4 0 1
	does write 5 0 1
	say write 6 0 1
	say nvme zns open-zone "$DEV" -s "$(lba 6)"
	say append 6 1
	say nvme zns finish-zone "$DEV" -s "$(lba 6)"
	say nvme zns report-zones "$DEV" -d 8
	echo "## all zones at once"
	zsend 0 0x103
	zsend 0 0x101
	say nvme zns report-zones "$DEV" -d 8
	zsend 0 0x102
	zsend 0 0x105
	say nvme zns report-zones "$DEV" -d 8
	zsend 0 0x104
	say nvme zns report-zones "$DEV" -S 1 -d 1
	# Implicitly open zones make way.
	for z in 0 1 2 3 4; do does write $z 0 1; done
	say nvme zns report-zones "$DEV" -d 6
	does nvme zns reset-zone "$DEV" -a
}

# Descriptor extensions.
extensions() {
	echo "## descriptor extensions"
	does nvme zns reset-zone "$DEV" -a
	say nvme zns set-zone-desc "$DEV" -s "$(lba 2)" -d 64
	state 2
	say nvme zns set-zone-desc "$DEV" -s "$(lba 2)" -d 64
	does write 3 0 1
	say nvme zns set-zone-desc "$DEV" -s "$(lba 3)" -d 64
	say nvme zns report-zones "$DEV" -e -s "$(lba 1)" -d 2
	say nvme zns report-zones "$DEV" -S 8
	does write 2 0 1
	does nvme zns finish-zone "$DEV" -s "$(lba 2)"
	state 2
	does nvme zns reset-zone "$DEV" -s "$(lba 2)"
	say nvme zns report-zones "$DEV" -e -s "$(lba 2)" -d 1
	does nvme zns open-zone "$DEV" -s "$(lba 4)"
	say nvme zns set-zone-desc "$DEV" -s "$(lba 4)" -d 64
	for z in 5 6 7 8; do does nvme zns set-zone-desc "$DEV" -s "$(lba $z)" -d 64; done
	say nvme zns set-zone-desc "$DEV" -s "$(lba 9)" -d 64
	say nvme zns report-zones "$DEV" -e -s "$(lba 9)" -d 1
	zsend 0 0x110
	does nvme zns reset-zone "$DEV" -a
}

# Zone random write areas of 16 blocks, committed by 4.
random_write_areas() {
	local z
	echo "## random write areas"
	say nvme zns open-zone "$DEV" -s "$(lba 2)" -r
	state 2
	say write 2 8 2
	state 2
	say nvme read "$DEV" -s $(($(lba 2) + 8)) -c 1 -z 8192 -d read
	echo "as written: $(head -c 8192 read | cmp - <(head -c 8192 1M) && echo yes)"
	say write 2 8 1
	say write 2 0 4
	say append 2 1
	say write 2 31 1
	state 2
	say write 2 40 1
	say write 2 3 1
	# In the middle of what is committed at a time, right, behind the pointer, the last of the window, and past it.
	say nvme zns zrwa-flush-zone "$DEV" -l $(($(lba 2) + 30))
	say nvme zns zrwa-flush-zone "$DEV" -l $(($(lba 2) + 31))
	state 2
	say nvme zns zrwa-flush-zone "$DEV" -l $(($(lba 2) + 19))
	say nvme zns zrwa-flush-zone "$DEV" -l $(($(lba 2) + 51))
	say nvme zns zrwa-flush-zone "$DEV" -l $(($(lba 2) + 47))
	state 2
	does nvme zns open-zone "$DEV" -s "$(lba 3)"
	say nvme zns open-zone "$DEV" -s "$(lba 3)" -r
	say nvme zns zrwa-flush-zone "$DEV" -l $(($(lba 3) + 3))
	say nvme zns open-zone "$DEV" -s "$(lba 4)" -r
	say nvme zns open-zone "$DEV" -s "$(lba 5)" -r
	say nvme zns report-zones "$DEV" -d 6
	say nvme zns close-zone "$DEV" -s "$(lba 4)"
	state 4
	say nvme zns open-zone "$DEV" -s "$(lba 5)" -r
	state 5
	say nvme zns finish-zone "$DEV" -s "$(lba 2)"
	state 2
	say nvme zns reset-zone "$DEV" -s "$(lba 2)"
	state 2
	does nvme zns reset-zone "$DEV" -a
	does write 6 0 1
	does nvme zns close-zone "$DEV" -s "$(lba 6)"
	say nvme zns open-zone "$DEV" -s "$(lba 6)" -r
	state 6
	does nvme zns reset-zone "$DEV" -a
}

commands() {
	local z part
	echo "## other commands"
	does write 0 0 256
	does nvme write "$PLAIN" -s 0 -c 7 -z $((8 * BLOCK)) -d 1M
	head -c $((8 * BLOCK)) 1M | tail -c $((4 * BLOCK)) >behind
	say nvme flush "$DEV" -n 1
	say nvme flush "$DEV" -n 0xffffffff
	say nvme flush "$DEV" -n 9
	say nvme compare "$DEV" -s 0 -c 1 -z 8192 -d 1M
	say nvme compare "$DEV" -s 1 -c 1 -z 8192 -d 1M
	say nvme verify "$DEV" -s 0 -c 7
	say nvme verify "$DEV" -s "$(lba 16)" -c 0
	say nvme write-zeroes "$DEV" -s 256 -c 7
	say nvme write-zeroes "$DEV" -s 0 -c 7
	state 0
	say nvme write-zeroes "$PLAIN" -s 0 -c 3
	say nvme compare "$PLAIN" -s 4 -c 3 -z $((4 * BLOCK)) -d behind
	say nvme dsm "$DEV" -d -s 0 -b 8
	say nvme dsm "$PLAIN" -d -s 0 -b 8
	say nvme dsm "$PLAIN" -d -s 0xffffffff -b 8
	say nvme write-uncor "$PLAIN" -s 0 -c 0
	say nvme write-uncor "$DEV" -s $(($(lba 2) + 1)) -c 7
	say nvme write-uncor "$DEV" -s "$(lba 2)" -c 7
	say nvme zns report-zones "$DEV" -s "$(lba 2)" -d 1
	does nvme zns reset-zone "$DEV" -s "$(lba 2)"
	say nvme copy "$DEV" --sdlba="$(lba 1)" --slbs=0,8 --blocks=3,3
	for z in 0 4; do
		say nvme read "$DEV" -s $(($(lba 1) + z)) -c 3 -z 16384 -d copied
		for part in 0 4 8 12; do
			cmp -s <(head -c 16384 copied) <(tail -c +$((part * 4096 + 1)) 1M | head -c 16384) && echo "block $part and after"
		done
		echo "zeros: $(head -c 16384 copied | tr -dc '\000' | wc -c | sed 's/^[1-9].\{0,2\}$/few/')"
	done
	say nvme copy "$DEV" --sdlba="$(lba 1)" --slbs=0 --blocks=3
	state 1
	say nvme io-passthru "$DEV" --opcode=0x7f --namespace-id=1
	say nvme io-passthru "$DEV" --opcode=0x99 --namespace-id=1
}

logs() {
	local page
	echo "## logs and features"
	fields '^(critical_warning|temperature|data_units|host_|controller_busy|power_|unsafe|media|num_err|.*time|temperature_sensor)' nvme smart-log "$NVME"
	nvme smart-log "$NVME" -o json | jq -r '"warnings \(.critical_warning | objects.value // .), media errors \(.media_errors)"'
	fields '^$' nvme error-log "$NVME" -e 1
	say nvme changed-ns-list-log "$NVME"
	say nvme get-log "$NVME" -i 0xbf -n 1 -l 64
	say nvme get-log "$NVME" -i 0xbf -n 2 -l 64
	say nvme get-log "$NVME" -i 0x7f -l 64
	say nvme get-log "$NVME" -i 2 -l 6
	fields '^$' nvme effects-log "$NVME" --csi=2
	for page in 0 3 4 5 6 0xd 0x10 0x70 0x80; do
		echo "\$ # log page $page"
		nvme get-log "$NVME" -i $page -l 512 -b 2>&1 >page | names
		[ -s page ] && echo answered
	done
	for page in 1 2 3 4 5 6 7 8 9 0xa 0xb 0xc 0xd 0xe 0xf 0x10 0x11 0x16 0x17 0x18 0x19 0x80 0x81 0x82 0x83 0x84; do
		echo "\$ # feature $page"
		nvme get-feature "$NVME" -f $page -n 1 2>&1 | sed -n '1p' | sed -E 's/^get-feature:[^ ]* *\([^)]*\), *//' | names
		nvme get-feature "$NVME" -f $page -n 1 -s 3 2>&1 | sed -n '1,4p' | sed -E 's/^get-feature:[^ ]* *\([^)]*\), *//' | names
	done
	say nvme set-feature "$NVME" -f 4 -V 0x140
	say nvme set-feature "$NVME" -f 6 -V 0
	say nvme get-feature "$NVME" -f 6
	say nvme set-feature "$NVME" -f 6 -V 1
	say nvme set-feature "$NVME" -f 0x70 -V 1
	say nvme set-feature "$NVME" -f 7 -V 0xffffffff
}

programs() {
	echo "## programs"
	say nvme reset "$NVME"
	# The kernel has pointers of its own, and hears of no reset but its own.
	does blkzone reset "$DEV"
	say blkzone capacity "$DEV"
	echo "\$ smartctl"
	smartctl -a "$NVME" >smart 2>&1
	echo "status $?"
	grep -E '^(SMART overall|Critical Warning|Available Spare|Percentage Used|Media and Data|Number of Namespaces|NVMe Version|Maximum Data|Firmware Updates|Error Information)' smart | sed -E 's/ +/ /g'
	for options in "write 64k 1" "write 4k 16" "read 64k 1" "randread 4k 16" "randwrite 64k 4"; do
		read -r rw bs depth <<<"$options"
		echo "\$ fio --zonemode=zbd --rw=$rw --bs=$bs --iodepth=$depth"
		fio --name=fio --filename="$DEV" --direct=1 --ioengine=libaio --zonemode=zbd --rw="$rw" --bs="$bs" --iodepth="$depth" \
			--io_size=6M --size=24M --max_open_zones=3 --output-format=json --output=fio 2>&1 | names
		jq -r '.jobs[0] | "error \(.error), read \(.read.io_bytes), written \(.write.io_bytes)"' fio
	done
	say nvme zns report-zones "$DEV" -d 6
}

# blocks: what the namespace and the kernel say of its blocks.
blocks() {
	echo "\$ # blocks"
	nvme id-ns "$DEV" -H | grep 'in use' | sed 's/ *$//'
	echo "kernel $(cat "/sys/block/${DEV#/dev/}/queue/logical_block_size")"
}

# Erased as it is, and to blocks of 512 bytes. The last thing, since what comes before counts blocks of 4096.
formats() {
	local size
	echo "## formats"
	blocks
	say nvme format "$DEV" -f
	say nvme zns report-zones "$DEV" -S 1 -d 1
	say nvme format "$DEV" -f -l 8
	say nvme format "$PLAIN" -f -l 4
	say nvme format "$DEV" -f -l 0 -i 1
	does nvme zns reset-zone "$DEV" -a
	does write 3 0 1
	does nvme zns open-zone "$DEV" -s "$(lba 4)"
	say nvme format "$DEV" -f -l 0
	blocks
	say nvme zns report-zones "$DEV" -d 1
	say nvme zns report-zones "$DEV" -S 1 -d 1
	# The kernel has pointers of its own, and hears of no reset but its own.
	does blkzone reset "$DEV"
	size=$(cat "/sys/block/${DEV#/dev/}/queue/logical_block_size")
	echo "\$ # two blocks are written to zone 2, and one appended"
	nvme write "$DEV" -s $((2 * ZONE_MB * 1048576 / size)) -c 1 -z $((2 * size)) -d 1M 2>&1 | names
	nvme zns zone-append "$DEV" -s $((2 * ZONE_MB * 1048576 / size)) -z "$size" -d 1M 2>&1 | names
	echo "\$ # the kernel writes three sectors to zone 5"
	dd if=1M of="$DEV" bs=512 count=3 seek=$((5 * ZONE_MB * 2048)) oflag=direct conv=notrunc status=none 2>&1 | names
	say blkzone report -o $((5 * ZONE_MB * 2048)) -c 1 "$DEV"
	cp 1M "/share/$name-data"
}

# After a restart of zbdkit's daemon: blocks and data are as they were, and the kernel goes on.
formatted() {
	local zone
	find_nvme 2
	expect "logical block size" 512 "$(cat "/sys/block/${DEV#/dev/}/queue/logical_block_size")"
	for zone in 2 5; do expect "write pointer of zone $zone" "3 cl" "$(zone $zone)"; done
	run cmp -n 1024 /share/zbdkit-data <(get 2 0 1024)
	run cmp -n 512 /share/zbdkit-data <(get 2 1024 512)
	run cmp -n 1536 /share/zbdkit-data <(get 5 0 1536)
	run dd if=/share/zbdkit-data of="$DEV" bs=512 skip=3 count=5 seek=$((5 * ZONE_MB * 2048 + 3)) oflag=direct conv=notrunc status=none
	run cmp -n 4096 /share/zbdkit-data <(get 5 0 4096)
}

if [ "$PART" = formatted ]; then
	formatted
	exit 0
fi

for name in zbdkit qemu; do
	model=$name
	[ $name = zbdkit ] || model="QEMU NVMe Ctrl"
	find_nvme 2 "$model" || fail "no drive of $name"
	BLOCK=$(cat /sys/block/${PLAIN#/dev/}/queue/logical_block_size)
	[ "$(cat "/sys/block/${DEV#/dev/}/nsid")" = 1 ] || fail "the zoned namespace is not the first"
	mkdir /tmp/$name
	# Both at the same time, each in a directory of its own.
	(
		cd /tmp/$name || exit 1
		head -c 1M /dev/urandom >1M
		# The extension is shown, so it is the same in every run.
		printf 'zone descriptor extension%39s' >64
		descriptions
		conditions
		reports
		mistakes
		extensions
		random_write_areas
		commands
		logs
		programs
		formats
	) >/share/$name 2>&1 &
done
wait
for name in zbdkit qemu; do
	grep -n '^FAILED' /share/$name && fail "what was to work on $name did not"
	echo "$name: $(grep -c '^\$' /share/$name) commands"
done
dmesg | grep -E 'nvme.*timeout' && fail "the kernel complains"
exit 0
