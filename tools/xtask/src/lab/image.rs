//! The nodes' kernel and initial ram disk, made once and kept in a cache.
//!
//! The kernel is Debian's own package, unpacked and never installed. An image is built in a folder of its own and
//! renamed into place, so one that exists is complete, whoever was interrupted or ran at the same time.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cpio::Archive;
use crate::error::{At, Error, Result};
use crate::process::Bounded;

const INIT: &str = include_str!("../../../lab/init");
const BUSYBOX: &str = "/bin/busybox";

/// Modules a node loads, in this order, each after what it depends on.
const MODULES: &[&str] = &[
    // rdma_rxe asks the crypto layer for "crc32" by name; no module dependency says so.
    "crc32_generic",
    "crc32_pclmul",
    "virtio_pci",
    "virtio_net",
    "9pnet_virtio",
    "9p",
    "overlay",
    "ib_uverbs",
    "rdma_ucm",
    "rdma_rxe",
    // Faults that tests make: delay, loss, and blocked ports.
    "sch_netem",
];

const FOLDERS: &[&str] = &["bin", "modules", "proc", "sys", "dev", "mnt", "mnt/host", "mnt/rw", "newroot"];

const ASK_APT: Duration = Duration::from_secs(60);
const UPDATE: Duration = Duration::from_secs(300);
const DOWNLOAD: Duration = Duration::from_secs(600);
const UNPACK: Duration = Duration::from_secs(300);

/// A kernel and an initial ram disk to boot.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// A kernel package as apt knows it.
#[derive(Debug, PartialEq, Eq)]
struct KernelPackage {
    name: String,
    version: String,
}

/// The image from the cache, built first if it is not there.
pub(super) fn prepare() -> Result<Image> {
    let cache = cache_folder()?;
    std::fs::create_dir_all(&cache).at("create", &cache)?;
    remove_abandoned(&cache);
    let recipe = recipe();
    let package = match kernel_package() {
        Some(package) => package,
        // apt has no lists: any kernel we have will do, otherwise ask the mirror.
        None => match any_with(&recipe, &cache) {
            Some(folder) => return Ok(image_in(&folder)),
            None => updated_kernel_package()?,
        },
    };
    let folder = cache.join(format!("{recipe}-{}-{}", package.name, package.version.replace('/', "_")));
    if !folder.exists() {
        build(&cache, &folder, &package)?;
    }
    Ok(image_in(&folder))
}

fn image_in(folder: &Path) -> Image {
    Image { kernel: folder.join("vmlinuz"), initrd: folder.join("initrd") }
}

fn cache_folder() -> Result<PathBuf> {
    let set = |key| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("MOONRAIL_LAB_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("moonrail-lab")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/moonrail-lab")))
        .ok_or_else(|| {
            Error::new("no place for the lab's cache: neither MOONRAIL_LAB_CACHE nor HOME is set", "set one of them")
        })
}

/// A fingerprint of everything in an image that comes from this source.
fn recipe() -> String {
    let mut parts = vec![INIT];
    parts.extend(MODULES);
    parts.extend(FOLDERS);
    format!("{:016x}", fnv1a(&parts.join("\n")))
}

/// FNV-1a: the same in every build of this program, unlike the standard library's hasher.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn any_with(recipe: &str, cache: &Path) -> Option<PathBuf> {
    let folders = std::fs::read_dir(cache).ok()?.flatten().map(|entry| entry.path());
    folders.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(recipe))).max()
}

/// The kernel that `linux-image-amd64` stands for now, if apt's lists know.
fn kernel_package() -> Option<KernelPackage> {
    let depends = Bounded::new("apt-cache", ASK_APT).args(["depends", "linux-image-amd64"]).output().ok()?;
    let name = depended_kernel(&depends)?;
    let shown = Bounded::new("apt-cache", ASK_APT).args(["show", "--no-all-versions", &name]).output().ok()?;
    let version = shown.lines().find_map(|line| line.strip_prefix("Version: "))?.trim().to_owned();
    Some(KernelPackage { name, version })
}

fn depended_kernel(apt_says: &str) -> Option<String> {
    apt_says.lines().find_map(|line| {
        let name = line.trim().strip_prefix("Depends: ")?;
        name.strip_prefix("linux-image-")?.starts_with(|c: char| c.is_ascii_digit()).then(|| name.to_owned())
    })
}

fn updated_kernel_package() -> Result<KernelPackage> {
    println!("lab: apt-get update (apt's lists know no kernel)");
    let updated = Bounded::new("apt-get", UPDATE).args(["-q", "update"]).output();
    updated.map_err(|e| {
        Error::new(
            format!("apt knows no linux-image-amd64, and its lists could not be updated: {e}"),
            "run `apt-get update` as root",
        )
    })?;
    kernel_package().ok_or_else(|| {
        Error::new(
            "apt knows no package linux-image-amd64 even after an update",
            "the lab needs Debian's amd64 kernel: check /etc/apt/sources.list",
        )
    })
}

fn build(cache: &Path, folder: &Path, package: &KernelPackage) -> Result<()> {
    println!("lab: making the nodes' image from {} {} (once)", package.name, package.version);
    let work = cache.join(format!("{BUILDING}{}", std::process::id()));
    let built = build_in(&work, package).and_then(|made| match std::fs::rename(&made, folder) {
        // Somebody else was faster: theirs is as good.
        Err(_) if folder.exists() => Ok(()),
        other => other.at("create", folder),
    });
    let _ = std::fs::remove_dir_all(&work);
    built
}

const BUILDING: &str = "building-";

/// Removes what builds left behind that were killed.
fn remove_abandoned(cache: &Path) {
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(BUILDING) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes the image in `work` and returns the folder that holds it.
fn build_in(work: &Path, package: &KernelPackage) -> Result<PathBuf> {
    let (unpacked, made) = (work.join("package"), work.join("image"));
    for folder in [&unpacked, &made] {
        std::fs::create_dir_all(folder).at("create", folder)?;
    }
    let deb = download(work, package)?;
    Bounded::new("dpkg-deb", UNPACK).arg("-x").arg(&deb).arg(&unpacked).output()?;
    let modules_of = unpacked.join("lib/modules");
    let release = only_entry(&modules_of)?;
    Bounded::new("depmod", UNPACK).arg("-b").arg(&unpacked).arg(&release).env("PATH", path_with_sbin()).output()?;
    let kernel = unpacked.join(format!("boot/vmlinuz-{release}"));
    let to = made.join("vmlinuz");
    std::fs::copy(&kernel, &to).at("copy", &kernel)?;
    let initrd = made.join("initrd");
    std::fs::write(&initrd, ram_disk(&unpacked, &release)?).at("write", &initrd)?;
    Ok(made)
}

fn download(work: &Path, package: &KernelPackage) -> Result<PathBuf> {
    let wanted = format!("{}={}", package.name, package.version);
    let got = Bounded::new("apt-get", DOWNLOAD).args(["-q", "download", &wanted]).in_folder(work).output();
    got.map_err(|e| {
        Error::new(
            format!("cannot download the nodes' kernel {wanted}: {e}"),
            "check this machine's network; if the mirror has a newer one, run `apt-get update`",
        )
    })?;
    let entries = std::fs::read_dir(work).at("list", work)?.flatten().map(|entry| entry.path());
    entries
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| Error::new(format!("apt-get download left no package for {wanted}"), "run it again"))
}

fn only_entry(folder: &Path) -> Result<String> {
    let mut entries = std::fs::read_dir(folder).at("list", folder)?.flatten();
    let entry = entries.next().ok_or_else(|| {
        Error::new(
            format!("the kernel package has nothing in {}", folder.display()),
            "its layout has changed: adapt image.rs",
        )
    })?;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// kmod's programs are in sbin, which a user's PATH may lack.
fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn ram_disk(unpacked: &Path, release: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in FOLDERS {
        archive.folder(folder);
    }
    archive.file("init", INIT.as_bytes());
    let busybox = Path::new(BUSYBOX);
    archive.file("bin/busybox", &std::fs::read(busybox).at("read", busybox)?);
    let mut order = String::new();
    for path in module_files(unpacked, release)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.file(&format!("modules/{name}"), &std::fs::read(&path).at("read", &path)?);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    Ok(archive.finish())
}

/// The files of all modules, each after what it depends on.
fn module_files(unpacked: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let (mut files, mut seen) = (Vec::new(), HashSet::new());
    for module in MODULES {
        let said = Bounded::new("modprobe", ASK_APT)
            .arg("-d")
            .arg(unpacked)
            .args(["-S", release, "--show-depends", module])
            .env("PATH", path_with_sbin())
            .output()?;
        files.extend(insmod_lines(&said).map(PathBuf::from).filter(|path| seen.insert(path.clone())));
    }
    Ok(files)
}

/// `modprobe --show-depends` prints one `insmod FILE` or `builtin NAME` a line.
fn insmod_lines(modprobe_says: &str) -> impl Iterator<Item = &str> {
    modprobe_says.lines().filter_map(|line| line.strip_prefix("insmod ")?.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_the_one_with_a_number() {
        let says = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n";
        assert_eq!(depended_kernel(says).as_deref(), Some("linux-image-6.1.0-56-amd64"));
        assert_eq!(depended_kernel("linux-image-amd64\n  Depends: linux-image-rt-amd64\n"), None);
    }

    #[test]
    fn modules_built_into_the_kernel_need_no_file() {
        let says = "builtin libcrc32c\ninsmod /a/b.ko \ninsmod /c.ko option=1\n";
        assert_eq!(insmod_lines(says).collect::<Vec<_>>(), ["/a/b.ko", "/c.ko"]);
    }

    #[test]
    fn the_fingerprint_is_fnv1a() {
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn an_image_without_apt_lists_is_found_by_its_recipe() {
        let cache = std::env::temp_dir().join(format!("xtask-cache-{}", std::process::id()));
        std::fs::create_dir_all(cache.join("0123-linux-image-6.1")).expect("a folder");
        std::fs::create_dir_all(cache.join("building-1")).expect("a folder");
        assert_eq!(any_with("0123", &cache), Some(cache.join("0123-linux-image-6.1")));
        assert_eq!(any_with("4567", &cache), None);
        std::fs::remove_dir_all(cache).expect("clean");
    }
}
