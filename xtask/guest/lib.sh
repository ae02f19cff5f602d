# Helpers for the scripts that run in the guest. DEV is the drive under test.

# Fails the script with a reason.
fail() {
	echo "FAIL: $*"
	exit 1
}

# Shows a command, then runs it; the script fails if it does.
run() {
	echo "# $*"
	"$@" || fail "status $?: $*"
}

# expect WHAT WANTED GOT
expect() {
	[ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
	echo "ok: $1 = $3"
}
