//! The connection string of the metadata: which kind of store, and where.

/// Port of etcd when an endpoint names none.
pub const ETCD_PORT: u16 = 2379;

/// Where the metadata of the cluster is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetadataUri {
    /// `P2PHANDSHAKE`: no store, each peer is asked itself.
    PeerToPeer,
    /// A store.
    Store(StoreUri),
}

/// A store that holds the metadata.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreUri {
    /// etcd; endpoints as `host:port`, or with `http://` or `https://`, at least one.
    Etcd(Vec<String>),
    /// Mooncake's HTTP server; the whole base URL.
    Http(String),
    /// A map inside this process, for tests and demonstrations; engines that use the same name share it.
    Memory(String),
}

/// A connection string that leads nowhere.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// The word before `://` is none of ours.
    #[error(
        "metadata server {given:?}: {scheme:?} is not supported{}; use etcd://HOST:PORT[,HOST:PORT…], \
         http://HOST:PORT/metadata, https://…, P2PHANDSHAKE, or memory://NAME",
        if scheme == "redis" { " (redis is not built into this engine)" } else { "" }
    )]
    Scheme {
        /// What was given.
        given: String,
        /// The word.
        scheme: String,
    },
    /// Nothing behind the scheme.
    #[error(
        "metadata server {given:?} names no endpoint; use etcd://HOST:PORT[,HOST:PORT…], for example etcd://10.0.0.1:2379"
    )]
    Empty {
        /// What was given.
        given: String,
    },
    /// `P2PHANDSHAKE` in other letters.
    #[error("metadata server {given:?}: did you mean P2PHANDSHAKE, in capitals and without a scheme?")]
    PeerToPeerSpelling {
        /// What was given.
        given: String,
    },
}

impl MetadataUri {
    /// Reads a connection string. Without `://` it is an etcd list, split at `,` or `;`.
    ///
    /// # Errors
    /// See [`UriError`]; each names what is supported.
    pub fn parse(given: &str) -> Result<Self, UriError> {
        let text = given.trim();
        if text == "P2PHANDSHAKE" {
            return Ok(Self::PeerToPeer);
        }
        // A list item may carry a scheme of its own; the first item's then is the list's.
        let (scheme, rest) =
            text.split_once("://").filter(|(scheme, _)| !scheme.contains([',', ';'])).unwrap_or(("etcd", text));
        if rest.trim_matches('/').eq_ignore_ascii_case("p2phandshake") {
            return Err(UriError::PeerToPeerSpelling { given: given.to_owned() });
        }
        let store = match scheme {
            "etcd" => {
                StoreUri::Etcd(rest.split([',', ';']).map(str::trim).filter(|e| !e.is_empty()).map(endpoint).collect())
            }
            "http" | "https" => StoreUri::Http(text.to_owned()),
            "memory" => StoreUri::Memory(rest.to_owned()),
            _ => return Err(UriError::Scheme { given: given.to_owned(), scheme: scheme.to_owned() }),
        };
        match store {
            StoreUri::Etcd(endpoints) if endpoints.is_empty() => Err(UriError::Empty { given: given.to_owned() }),
            _ if rest.is_empty() => Err(UriError::Empty { given: given.to_owned() }),
            store => Ok(Self::Store(store)),
        }
    }
}

/// An endpoint with its port; an item of the list may itself carry `http://` or `https://`.
fn endpoint(item: &str) -> String {
    let item = item.trim_end_matches('/');
    let (scheme, host) = match item.split_once("://") {
        Some((scheme, host)) => (format!("{scheme}://"), host),
        None => (String::new(), item),
    };
    let bare_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
    let has_port = !bare_v6 && host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match (bare_v6, has_port) {
        (true, _) => format!("{scheme}[{host}]:{ETCD_PORT}"),
        (false, false) => format!("{scheme}{host}:{ETCD_PORT}"),
        (false, true) => format!("{scheme}{host}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etcd(endpoints: &[&str]) -> MetadataUri {
        MetadataUri::Store(StoreUri::Etcd(endpoints.iter().map(|e| (*e).to_owned()).collect()))
    }

    #[test]
    fn the_forms_that_are_understood() {
        for (text, expected) in [
            ("P2PHANDSHAKE", MetadataUri::PeerToPeer),
            ("10.0.0.1:2379", etcd(&["10.0.0.1:2379"])),
            ("etcd://a:1, b:2 ;;c", etcd(&["a:1", "b:2", "c:2379"])),
            ("etcd://fe80::1,[::1]:9", etcd(&["[fe80::1]:2379", "[::1]:9"])),
            ("a:1;https://b:2/", etcd(&["a:1", "https://b:2"])),
            ("http://h:8080/metadata", MetadataUri::Store(StoreUri::Http("http://h:8080/metadata".into()))),
            ("memory://t", MetadataUri::Store(StoreUri::Memory("t".into()))),
        ] {
            assert_eq!(MetadataUri::parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn an_error_says_what_is_supported() {
        for (text, word) in [
            ("redis://h", "redis is not built into"),
            ("consul://h", "etcd://HOST:PORT"),
            ("", "names no endpoint"),
            ("etcd:// , ", "names no endpoint"),
            ("p2phandshake", "P2PHANDSHAKE"),
            ("http://", "names no endpoint"),
        ] {
            let message = MetadataUri::parse(text).unwrap_err().to_string();
            assert!(message.contains(word), "{text}: {message}");
        }
    }
}
