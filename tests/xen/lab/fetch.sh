# Packages: downloaded by the machine's own package manager from its own mirror into
# $lab/tree/NAME, installed nowhere. Sourced after common.sh.

# The URI from which this machine gets a suite of the distribution ($1: "", "-security").
own_mirror() {
    local codename
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016 # $(…) is apt's
    APT_CONFIG='' apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$codename$1" '$1 == suite && $2 == "main" { print $3; exit }'
}

# A configuration of apt for one suite, with lists, cache and an empty dpkg status of its own. Nothing
# of the machine's own state is read or written but its mirror, proxy settings and keys.
apt_for() { # suite
    local suite="$1" dir="$lab/apt/$1" main security keys='' keyring
    main=$(own_mirror '')
    security=$(own_mirror -security)
    [ -n "$main" ] || die "this machine's package sources have no Debian mirror (apt-get indextargets)"
    for keyring in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
        [ -e "$keyring" ] && keys="[signed-by=$keyring]"
    done
    mkdir -p "$dir"/{lists/partial,archives/partial,parts}
    : > "$dir/status"
    {
        echo "deb $keys $main $suite main"
        case "$suite" in
            *-backports) ;;
            *) [ -z "$security" ] || echo "deb $keys $security $suite-security main" ;;
        esac
    } > "$dir/sources.list"
    # How the machine reaches its mirror. The rest of its settings stay out: they may have hooks that
    # clear the machine's own caches.
    APT_CONFIG='' apt-config dump | grep -iE '^Acquire::(https?|ftp|Retries|Proxy)' > "$dir/apt.conf" || true
    cat >> "$dir/apt.conf" <<CONF
Dir::Etc::parts "$dir/parts";
Dir::Etc::main "$dir/none";
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "$dir/parts";
Dir::State::lists "$dir/lists";
Dir::State::status "$dir/status";
Dir::Cache "$dir";
Dir::Cache::archives "$dir/archives";
APT::Sandbox::User "root";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Default-Release "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
CONF
    export APT_CONFIG="$dir/apt.conf"
    [ -e "$dir/updated" ] && return 0
    apt-get update -qq >&2
    touch "$dir/updated"
}

unpack() { # tree, packages' files…
    local tree="$1" deb
    shift
    for deb in "$@"; do dpkg-deb -x "$deb" "$tree"; done
}

# The hypervisor, its tools with every library they need, busybox.
fetch_xen() { # version, suite
    local version="$1" suite="$2" tree="$lab/tree/xen-$1"
    local -a libraries=("libxenmisc$version" libxenhypfs1 libxengnttab1 libxenforeignmemory1 libxenevtchn1
        libxenstore4 libxencall1 libxentoolcore1 libxentoollog1 xenstore-utils busybox-static libc6 libgcc-s1)
    # QEMU serves 9pfs, which copage is measured against.
    libraries+=(qemu-system-xen)
    # Their dependencies are for a host that runs from disk: scripts, emulators, a boot loader.
    local -a alone=("xen-hypervisor-$version-amd64" "xen-utils-$version" xen-utils-common)
    say "fetching Xen $version"
    (
        apt_for "$suite"
        rm -rf "$tree"
        mkdir -p "$tree"
        cd "$lab/apt/$suite/archives"
        apt-get install -qq -y --download-only "${libraries[@]}" >&2
        apt-get download -qq "${alone[@]}" >&2
        unpack "$tree" ./*.deb
        rm -f ./*.deb
        gunzip -c "$tree/boot/xen-$version-amd64.gz" > "$tree/xen"
    )
}

# Modules that the images may load, with what those depend on.
kernel_dirs=(drivers/xen drivers/virtio drivers/block net/9p fs/9p fs/netfs fs/fscache fs/fuse fs/overlayfs fs/ext4 fs/jbd2 crypto lib)

# A kernel: uncompressed, because the emulated machine would take longer over that than we do.
fetch_kernel() { # suite
    local suite="$1" tree="$lab/tree/linux-$1" package dir patterns=()
    say "fetching Linux of $suite"
    for dir in "${kernel_dirs[@]/%//*}" 'fs/mbcache.*'; do
        patterns+=("./lib/modules/*/kernel/$dir" "./usr/lib/modules/*/kernel/$dir")
    done
    (
        apt_for "$suite"
        package=$(apt-cache show --no-all-versions linux-image-amd64 | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p')
        [ -n "$package" ] || die "$suite has no linux-image-amd64"
        rm -rf "$tree"
        mkdir -p "$tree"
        cd "$lab/apt/$suite/archives"
        apt-get download -qq "$package" >&2
        # Not every kernel has every directory.
        dpkg-deb --fsys-tarfile "$package"_*.deb |
            tar -x -C "$tree" --wildcards './boot/vmlinuz-*' '*/modules.builtin' '*/modules.order' "${patterns[@]}" 2> /dev/null || true
        rm -f ./*.deb
        [ -d "$tree/usr/lib/modules" ] && { mkdir -p "$tree/lib"; mv "$tree/usr/lib/modules" "$tree/lib/modules"; }
        find "$tree/lib/modules" -name '*.ko.xz' -exec xz -d {} +
        find "$tree/lib/modules" -name '*.ko.zst' -exec zstd -qd --rm {} +
        (cd "$tree" && "$busybox" depmod -b . "${package#linux-image-}")
        vmlinux "$tree"/boot/vmlinuz-* > "$tree/vmlinux"
        printf '%s\n' "${package#linux-image-}" > "$tree/version"
    )
}

# The ELF file in a bzImage, by the setup header's fields (Documentation/x86/boot.rst).
vmlinux() { # bzImage
    local image="$1" sectors offset length magic
    sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$image")
    offset=$(od -An -tu4 -j $((0x248)) -N 4 "$image")
    length=$(od -An -tu4 -j $((0x24c)) -N 4 "$image")
    offset=$(((sectors + 1) * 512 + offset))
    magic=$(od -An -tx1 -j "$offset" -N 4 "$image" | tr -d ' ')
    local -a unpacked
    case "$magic" in
        fd377a58) unpacked=(xz -dc --single-stream) ;;
        28b52ffd) unpacked=(zstd -dqc) ;;
        1f8b*) unpacked=(gzip -dc) ;;
        *) die "$image is compressed in a way unknown here ($magic)" ;;
    esac
    # The payload's last four bytes are its unpacked length, no part of the stream.
    dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count=$((length - 4)) status=none | "${unpacked[@]}"
}

fetch_all() { # version; after describe_xen
    local kernel
    unless_done "$lab/tree/xen-$1.stamp" "$(digest "$here/lab/fetch.sh")" fetch_xen "$1" "$suite"
    busybox=$(find "$lab/tree/xen-$1" -path '*/bin/busybox')
    for kernel in "$dom0_kernel" "${guest_kernels[@]}"; do
        unless_done "$lab/tree/linux-$kernel.stamp" "$(digest "$here/lab/fetch.sh")" fetch_kernel "$kernel"
    done
}
