# The steps of QEMU's iotest "zoned" on null_blk, by zbdkit io and by QEMU's own qemu-io, each on a new device: both must
# print what the transcript says: it has "> COMMAND" lines and answers, one run of the program for each command.
# QEMU_SHARE names the directory with QEMU's tools, if there is one.
transcript=/share/zoned.transcript
DEV=/dev/nullb0 SIZE_MB=256000 ZONE_MB=256 CONVENTIONAL=0 MAX_OPEN=0 MAX_ACTIVE=0 SECTOR_BYTES=512
image=driver=host_device,filename=$DEV

# Copies qemu-io and its libraries out of the mounted tree, which is slow to run programs from.
fetch_qemu_io() {
	mkdir /tmp/qemu
	cp /mnt/usr/bin/qemu-io /mnt/usr/lib64/ld-linux-x86-64.so.2 /tmp/qemu/
	/tmp/qemu/ld-linux-x86-64.so.2 --inhibit-cache --library-path /mnt/usr/lib/x86_64-linux-gnu --list \
		/tmp/qemu/qemu-io | sed -n 's|.* => \(/mnt[^ ]*\) .*|\1|p' | xargs cp -t /tmp/qemu
}

qemu_io() {
	/tmp/qemu/ld-linux-x86-64.so.2 --inhibit-cache --library-path /tmp/qemu --argv0 qemu-io /tmp/qemu/qemu-io "$@"
}

zbdkit_io() {
	zbdkit io "$@"
}

# steps PROGRAM: the transcript as this program gives it.
steps() {
	local line
	grep '^> ' "$transcript" | while read -r line; do
		echo "$line"
		"$1" --cache writeback --aio threads -n --image-opts "$image" -c "${line#> }" </dev/null ||
			echo "exit status $?"
	done
}

# answer PROGRAM COMMAND...: what it says to these commands, and its status.
answer() {
	local program=$1 command
	local commands=()
	shift
	for command in "$@"; do commands+=(-c "$command"); done
	"$program" -n --image-opts "$image" "${commands[@]}" 2>/dev/null </dev/null
	echo "status $?"
}

programs=zbdkit_io
if [ -n "$QEMU_SHARE" ]; then
	mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144 "$QEMU_SHARE" /mnt || fail "no QEMU"
	run fetch_qemu_io
	run qemu_io --version
	programs="qemu_io zbdkit_io"
fi
grep -v -e '^#' -e '^\[' -e '^$' "$transcript" >/tmp/expected
[ "$(grep -c '^> ' /tmp/expected)" -gt 20 ] || fail "the transcript has no steps"

for program in $programs; do
	echo "== $program: the steps of the iotest"
	make_null_blk
	steps "$program" >"/tmp/$program" 2>"/tmp/$program.err"
	cat "/tmp/$program.err"
	diff -u /tmp/expected "/tmp/$program" || fail "$program differs"
	expect "what went to stderr" "" "$(cat "/tmp/$program.err")"
	remove_null_blk
done

# Where zbdkit is to differ from QEMU, or must not: docs/qemu-io.md.
MAX_OPEN=4 MAX_ACTIVE=6 SIZE_MB=1024 ZONE_MB=64 CONVENTIONAL=2
for program in $programs; do
	echo "== $program: beyond the iotest"
	make_null_blk
	echo "-- append to a full zone, before an empty one"
	answer "$program" "zf 192M 64M" "zap -p 192M 4k 4k" "zrp 192M 2" | tee /tmp/full
	echo "-- append to a conventional zone"
	answer "$program" "zap -p 0 4k 4k" | tee /tmp/conventional
	echo "-- reset of a conventional zone, and a zone that is none"
	answer "$program" "zrs 0 64M" "zo 128M 4k" "zo 1G 64M" "zrp 1G 1" | tee /tmp/refused
	echo "-- the limits"
	answer "$program" "zrs 128M 896M" "zo 128M 256M" "zo 384M 64M" | tee /tmp/limits
	if [ "$program" = zbdkit_io ]; then
		failed="zone append failed: Input/output error"
		expect "append to a full zone" "$failed" "$(head -1 /tmp/full)"
		expect "the zone after it" 1 "$(sed -n 's/^start: 0x80000, .* wptr 0x80000, zcond:\([0-9]*\),.*/\1/p' /tmp/full)"
		expect "append to a conventional zone" "$failed" "$(head -1 /tmp/conventional)"
		expect "one zone more than may be open" "zone open failed: Too many references: cannot splice" \
			"$(head -1 /tmp/limits)"
	fi
	remove_null_blk
done
