//! `cargo xtask setup` by somebody who may not install.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

/// As dpkg-query: everything is installed but cmake, which never was, and strace, which was removed.
const DPKG_QUERY: &str = r#"#!/bin/sh
for word; do
  case $word in
    -*|*{*) ;;
    cmake) echo "$word not-installed" ;;
    strace) echo "$word config-files" ;;
    *) echo "$word installed" ;;
  esac
done
"#;

fn script(path: &Path, text: &str) {
    fs::write(path, text).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
}

#[test]
fn who_may_not_install_is_told_what_is_missing_why_and_the_one_command() {
    let folder = std::env::temp_dir().join(format!("xtask-setup-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a temporary folder");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).expect("its mode");
    script(&folder.join("dpkg-query"), DPKG_QUERY);
    script(&folder.join("apt-get"), "#!/bin/sh\necho apt-get was called\n");
    // A copy, since somebody else may not be able to look into the folder it was built in.
    let xtask = folder.join("xtask");
    fs::copy(env!("CARGO_BIN_EXE_moonrail-xtask"), &xtask).expect("a copy");
    let root = fs::metadata("/proc/self").expect("procfs").uid() == 0;
    let mut command = if root { Command::new("setpriv") } else { Command::new(&xtask) };
    if root {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&xtask);
    }
    let path = format!("{}:/usr/bin:/bin", folder.display());
    let output = command.arg("setup").env("PATH", path).current_dir("/").output().expect("it runs");
    fs::remove_dir_all(&folder).expect("clean");

    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("2 of ") && said.contains("cmake              builds the C shim"), "{said}");
    assert!(said.contains("strace             counts the doorbells"), "{said}");
    let command = "sudo apt-get update && sudo apt-get install --no-install-recommends cmake strace";
    assert!(said.lines().any(|line| line.trim() == command), "{said}");
    assert!(!said.contains("apt-get was called"), "{said}");
}
