# Helpers for the scripts that run in the guest. DEV is the drive under test; SIZE_MB, ZONE_MB,
# CONVENTIONAL, MAX_OPEN, MAX_ACTIVE and SECTOR_BYTES say what it was made with.

# Fails the script with a reason.
fail() {
	echo "FAIL: $*"
	exit 1
}

# Shows a command, then runs it; the script fails if it does.
run() {
	echo "guest# $*"
	"$@" || fail "status $?: $*"
}

# Shows a command, then runs it; the script fails if it succeeds.
refuse() {
	echo "guest# $*    (must fail)"
	"$@" 2>&1 && fail "this should have failed: $*"
	return 0
}

# expect WHAT WANTED GOT
expect() {
	[ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
	echo "ok: $1: $3"
}

# Makes /dev/nullb0 with the geometry that the drive would have: the kernel's own idea of zones. CAPACITY_MB, where it is set,
# is what can be written of each.
make_null_blk() {
	local dir=/sys/kernel/config/nullb/nullb0
	modprobe null_blk nr_devices=0 || fail "no null_blk"
	mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
	mkdir "$dir"
	echo "$SIZE_MB" >$dir/size
	echo "$SECTOR_BYTES" >$dir/blocksize
	echo 1 >$dir/memory_backed
	echo 1 >$dir/zoned
	echo "$ZONE_MB" >$dir/zone_size
	[ -z "$CAPACITY_MB" ] || echo "$CAPACITY_MB" >$dir/zone_capacity
	echo "$CONVENTIONAL" >$dir/zone_nr_conv
	echo "$MAX_OPEN" >$dir/zone_max_open
	echo "$MAX_ACTIVE" >$dir/zone_max_active
	echo 1 >$dir/power || fail "null_blk refuses this geometry"
	udevadm settle
}

# Takes it away again, with what is in it.
remove_null_blk() {
	echo 0 >/sys/kernel/config/nullb/nullb0/power
	rmdir /sys/kernel/config/nullb/nullb0 || fail "null_blk is in use"
}

# zone NUMBER: "WPTR CONDITION" of one zone, WPTR in 512-byte sectors from its start, as blkzone shows it.
zone() {
	blkzone report -o $(($1 * ZONE_MB * 2048)) -c 1 "$DEV" |
		sed -n 's/.*wptr 0x\([0-9a-f]*\) .*zcond: *[0-9]*(\(..\)).*/\1 \2/p' |
		while read -r wptr condition; do echo "$((16#$wptr)) $condition"; done
}

# zones: a line "NUMBER WPTR CONDITION" for each zone; open ones as closed, which a restart makes of them.
zones() {
	local z
	for ((z = 0; z < SIZE_MB / ZONE_MB; z++)); do
		echo "$z $(zone $z | sed 's/ o[ie]$/ cl/')"
	done
}

# put FILE ZONE OFFSET: writes FILE, whole blocks of 4 KiB, at OFFSET bytes into ZONE, past the page cache.
put() {
	local bs=64k
	# dd writes a shorter last block through the page cache: there must be none.
	[ $(($(stat -c %s "$1") % 65536)) = 0 ] || bs=4k
	dd if="$1" of="$DEV" bs=$bs seek=$(($2 * ZONE_MB * 1048576 + $3)) oflag=direct,seek_bytes conv=notrunc status=none
}

# get ZONE OFFSET LENGTH: reads from ZONE, past the page cache.
get() {
	dd if="$DEV" bs=4k skip=$(($1 * ZONE_MB * 1048576 + $2)) count="$3" iflag=direct,skip_bytes,count_bytes status=none
}

# unwritten ZONE OFFSET LENGTH: fails unless the bytes there read as what nobody wrote.
# That is zeros; null_blk, the kernel's reference, gives 0xff above the write pointer.
unwritten() {
	local others
	others=$(get "$1" "$2" "$3" | if [ "$DEV" = /dev/nullb0 ]; then tr -d '\000\377'; else tr -d '\000'; fi | wc -c)
	expect "bytes of old data in zone $1 from $2" 0 "$others"
	expect "bytes read there" "$(numfmt --from=iec "${3^^}")" "$(get "$1" "$2" "$3" | wc -c)"
}

# told WORDS COMMAND...: the command must fail, and say these words.
told() {
	local words=$1 said
	shift
	said=$("$@" 2>&1) && fail "this should have failed: $*"
	case "$said" in *"$words"*) echo "ok: $*: $said" ;; *) fail "$* said: $said" ;; esac
}

# find_nvme COUNT [MODEL]: waits until the controller of that model, zbdkit's unless another is named, has that many namespaces.
# NVME is the controller then, DEV its zoned namespace, PLAIN the one without zones.
find_nvme() {
	local model=${2:-zbdkit} i controller device
	modprobe nvme || fail "no nvme driver"
	# Namespaces are found in no particular order, some time after the controller.
	for ((i = 0; i < 200; i++)); do
		for controller in /sys/class/nvme/nvme*; do
			case "$(cat "$controller/model" 2>/dev/null)" in "$model"*) NVME=/dev/${controller##*/} ;; esac
		done
		[ -n "$NVME" ] && [ "$(ls -d "$NVME"n? 2>/dev/null | wc -l)" = "$1" ] && break
		sleep 0.1
	done
	udevadm settle
	[ -n "$NVME" ] || fail "no NVMe controller of the model $model"
	expect "namespaces of $NVME" "$1" "$(ls -d "$NVME"n? 2>/dev/null | wc -l)"
	DEV='' PLAIN=''
	for device in "$NVME"n?; do
		case "$(lsblk -dnr -z -o ZONED "$device")" in
		host-managed) DEV=$device ;;
		none) PLAIN=$device ;;
		esac
	done
}
