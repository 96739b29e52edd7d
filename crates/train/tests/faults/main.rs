//! The fault harness: nothing that was reported as saved is lost, nothing damaged is loaded, and a run that was hit ends with the bytes of one
//! that was not. `layer` is the disk that fails; `power` what a power cut leaves; `saves` one checkpoint, `runs` a whole run on that disk;
//! `damage` files that were changed; `kills` real processes.
//!
//! Every test prints `faults: <what> injected=<n> kills=<n> wrong=0`; `make test-faults` and `make test-faults-long` add the lines up.

mod damage;
mod kills;
mod layer;
mod power;
mod runs;
mod saves;
mod sizes;
mod tiny;
