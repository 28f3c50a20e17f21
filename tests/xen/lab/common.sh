# What all parts of the laboratory share: where things are, what is said when something is missing,
# and the stamps by which only what changed is made again. Sourced, with `set -Eeuo pipefail` on.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$here/../.." && pwd)
target="${CARGO_TARGET_DIR:-$root/target}"
case "$target" in /*) ;; *) target="$root/$target" ;; esac
lab="$target/xen-lab"

say() { printf '%s\n' "$*" >&2; }
die() { say "xen laboratory: $*"; exit 2; }

# The suite that Xen and dom0's kernel come from, and those the guests' kernels come from.
describe_xen() { # version -> suite, kernels
    case "$1" in
        4.17) suite=bookworm dom0_kernel=bookworm guest_kernels=(bookworm bookworm-backports) ;;
        4.20) suite=trixie dom0_kernel=trixie guest_kernels=(trixie bookworm) ;;
        *) die "no such hypervisor: $1 (there are 4.17 and 4.20)" ;;
    esac
}

need_programs() { # install?
    local missing=() pair
    local PATH="$PATH:/usr/sbin:/sbin"
    for pair in qemu-system-x86_64:qemu-system-x86 xz:xz-utils zstd:zstd readelf:binutils setpriv:util-linux mke2fs:e2fsprogs \
        dpkg-deb:dpkg apt-get:apt flock:util-linux; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} = 0 ] && return 0
    local -a get=(apt-get install -y --no-install-recommends "${missing[@]}")
    [ "$1" = install ] || die "these packages are missing: ${missing[*]}
to get them: ${get[*]}        (or run tests/xen/run --install)"
    local -a as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "${get[@]}" -qq >/dev/null
}

# QEMU 10 does not run PVH guests in emulation; 7.2 was measured.
note_qemu() {
    local version
    version=$(qemu-system-x86_64 --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p')
    case "$version" in
        7.2.*) ;;
        *) say "note: this QEMU is $version; the laboratory was made for 7.2, and with 10 no PVH guest comes up" ;;
    esac
}

one_at_a_time() {
    mkdir -p "$lab"
    exec 9> "$lab/lock"
    flock -n 9 || { say "waiting for another run in $lab"; flock 9; }
}

# Runs the command unless the stamp says that it ran with these inputs. What it makes must depend on
# nothing else.
unless_done() { # stamp, inputs as text, command…
    local stamp="$1" inputs="$2"
    shift 2
    [ -e "$stamp" ] && [ "$(< "$stamp")" = "$inputs" ] && return 0
    rm -f "$stamp"
    "$@"
    printf '%s\n' "$inputs" > "$stamp"
}

digest() { sha256sum -- "$@" | sha256sum | cut -d ' ' -f 1; }
