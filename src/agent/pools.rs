//! The pools of this node: directories that are opened once an NbdPool names them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::daemon::chain;
use crate::kube::api::NbdPoolSpec;
use crate::storage::{Overcommit, Pool, StorageError};

/// The open pools, by the name of their NbdPool.
pub(super) struct Pools {
    /// Where the host's directories are seen from here.
    root: PathBuf,
    open: Mutex<HashMap<String, Arc<Pool>>>,
}

/// Why a pool cannot be used on this node.
#[derive(Debug, thiserror::Error)]
pub(super) enum PoolError {
    #[error("there is no NbdPool {0}")]
    Unknown(String),
    #[error(
        "{path} is not mounted into the agent: the chart mounts the directories of the pools in its values",
        path = .0.display()
    )]
    Unseen(PathBuf),
    #[error(
        "no pool is in {path}, but {volumes} volumes were kept there: is the right disk mounted?",
        path = .path.display()
    )]
    Missing { path: PathBuf, volumes: usize },
    #[error("{path} is not the pool that it was: is the right disk mounted?", path = .0.display())]
    Replaced(PathBuf),
    #[error("overcommitRatio {0:?} is not a ratio from 0.001 to 1000")]
    Ratio(String),
    #[error("{}", chain(.0))]
    Storage(#[from] StorageError),
    #[error("this process is shutting down")]
    ShuttingDown,
}

impl Pools {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            open: Mutex::default(),
        }
    }

    /// The pool, opened if it is not yet, and as its NbdPool wants it now. `expected` volumes were made there before:
    /// where that is not none, no new pool is made. Blocks.
    pub(super) fn open(
        &self,
        name: &str,
        spec: &NbdPoolSpec,
        expected: usize,
    ) -> Result<Arc<Pool>, PoolError> {
        let overcommit = match &spec.overcommit_ratio {
            None => Overcommit::NONE,
            Some(text) => text.parse().map_err(|_| PoolError::Ratio(text.clone()))?,
        };
        let host = Path::new(&spec.backend.directory.path);
        let path = self.root.join(host.strip_prefix("/").unwrap_or(host));
        let mut open = self.opened();
        if let Some(pool) = open.get(name) {
            // The disk may have gone, or another one come, under a pool that is open.
            if Pool::identity_of(&path)?.as_deref() == Some(pool.identity()) {
                pool.set_overcommit(overcommit);
                return Ok(Arc::clone(pool));
            }
            if Arc::strong_count(pool) > 1 {
                return Err(PoolError::Replaced(host.to_owned()));
            }
            open.remove(name);
        }
        if !path.is_dir() {
            return Err(PoolError::Unseen(host.to_owned()));
        }
        if expected > 0 && Pool::identity_of(&path)?.is_none() {
            return Err(PoolError::Missing {
                path: host.to_owned(),
                volumes: expected,
            });
        }
        let pool = Arc::new(Pool::open(&path, overcommit)?);
        tracing::info!(pool = name, path = %host.display(), identity = pool.identity(), "opened");
        open.insert(name.to_owned(), Arc::clone(&pool));
        Ok(pool)
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<String, Arc<Pool>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::api::{Backend, DirectoryBackend};

    fn spec(path: &str, ratio: Option<&str>) -> NbdPoolSpec {
        NbdPoolSpec {
            node_selector: Default::default(),
            backend: Backend {
                directory: DirectoryBackend {
                    path: path.to_owned(),
                },
            },
            overcommit_ratio: ratio.map(str::to_owned),
            reachable: Default::default(),
            host_network: false,
        }
    }

    #[test]
    fn a_pool_is_opened_once_and_a_disk_that_is_missing_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("srv/pool");
        let pools = Pools::new(root.path());
        let spec = spec("/srv/pool", None);
        assert!(matches!(
            pools.open("a", &spec, 0),
            Err(PoolError::Unseen(_))
        ));
        std::fs::create_dir_all(&disk).unwrap();
        assert!(matches!(
            pools.open("a", &spec, 3),
            Err(PoolError::Missing { volumes: 3, .. })
        ));
        let identity = pools.open("a", &spec, 0).unwrap().identity().to_owned();
        assert_eq!(pools.open("a", &spec, 3).unwrap().identity(), identity);
        // The same directory under another name would be counted twice.
        assert!(pools.open("b", &spec, 0).is_err());

        std::fs::rename(&disk, root.path().join("away")).unwrap();
        std::fs::create_dir(&disk).unwrap();
        assert!(matches!(
            pools.open("a", &spec, 3),
            Err(PoolError::Missing { .. })
        ));
        std::fs::remove_dir(&disk).unwrap();
        std::fs::rename(root.path().join("away"), &disk).unwrap();
        assert_eq!(pools.open("a", &spec, 3).unwrap().identity(), identity);
    }

    #[test]
    fn the_ratio_may_change() {
        let root = tempfile::tempdir().unwrap();
        let pools = Pools::new(root.path());
        let whole = |ratio| {
            let pool = pools.open("a", &spec("/", Some(ratio)), 0).unwrap();
            pool.promisable().unwrap()
        };
        let (once, ten) = (whole("1"), whole("10"));
        assert!(ten > once * 9, "{once} {ten}");
        assert!(matches!(
            pools.open("a", &spec("/", Some("0")), 0),
            Err(PoolError::Ratio(_))
        ));
    }
}
