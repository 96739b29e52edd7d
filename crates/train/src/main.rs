//! `moe-lab`: trains a run file (the baseline without one) and prints its table. Results go to stdout, progress to stderr.

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use train::metrics::Row;
use train::reproduce::Original;
use train::run::Run;
use train::untrusted::shown;
use train::{TrainError, Trainer};

/// Trains adaptive sparse transformers. Without arguments: the baseline on the shipped data.
#[derive(Parser)]
#[command(name = "moe-lab", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Subcommand)]
enum Verb {
    /// Time training steps of a preset on one random batch: tokens per second, memory, share of what this machine can do.
    Bench(BenchArgs),
    /// Go on where a run stopped.
    Resume {
        /// The run directory.
        run: PathBuf,
        /// Go on with another engine: cpu, reference or torch (the device falls back to cpu unless it is given).
        #[arg(long)]
        engine: Option<String>,
        /// Go on on another device of the engine.
        #[arg(long)]
        device: Option<String>,
        /// Go on with other products: f32 or bf16.
        #[arg(long)]
        dtype: Option<String>,
        /// One JSON object on the last line of stdout.
        #[arg(long)]
        json: bool,
    },
    /// Train a finished run again from its own record and compare every byte, or say which input differs.
    Reproduce {
        /// The run directory.
        run: PathBuf,
        /// The directory of the new run (default: runs/<time>-<name>).
        #[arg(long)]
        out: Option<PathBuf>,
        /// One JSON object on the last line of stdout.
        #[arg(long)]
        json: bool,
    },
    /// Try learning rates from 1e-7 to 1 on the first phase of a run and suggest one; writes nothing.
    LrFind(LrFindArgs),
    /// What a run file may say.
    Config {
        #[command(subcommand)]
        form: Form,
    },
}

#[derive(Subcommand)]
enum Form {
    /// The JSON Schema of a run file.
    Schema,
    /// Every key: type, default, meaning.
    Docs,
}

#[derive(Args)]
struct TrainArgs {
    /// A run file, or the name of a shipped one (baseline, stage1, stage2c, …; a wrong name lists them).
    #[arg(default_value = "baseline")]
    run: String,
    /// Set a key of the run file, dotted: --set train.learning_rate=3e-4 (repeatable).
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Seed of initial values, order and sampling.
    #[arg(long)]
    seed: Option<u64>,
    /// The run directory (default: runs/<time>-<name>).
    #[arg(long)]
    out: Option<PathBuf>,
    /// 10 epochs a phase: a first look in well under a minute.
    #[arg(long)]
    quick: bool,
    /// Validate the run file and the data, print the plan, train nothing.
    #[arg(long)]
    check: bool,
    /// Threads of the trainer (0 = all cores).
    #[arg(long)]
    threads: Option<usize>,
    #[arg(long)]
    engine: Option<String>,
    #[arg(long)]
    device: Option<String>,
    #[arg(long)]
    dtype: Option<String>,
    /// One JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct LrFindArgs {
    /// A run file, or the name of a shipped one.
    #[arg(default_value = "baseline")]
    run: String,
    /// Set a key of the run file, dotted: --set train.optimizer=sgd (repeatable).
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// One JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BenchArgs {
    /// Shapes: seed, small or medium.
    #[arg(long, default_value = "small")]
    preset: String,
    /// Positions: cope or rope.
    #[arg(long, default_value = "cope")]
    pos: String,
    /// A dense SwiGLU in place of top-p experts.
    #[arg(long)]
    dense: bool,
    /// Plain attention in place of the mixture of heads.
    #[arg(long)]
    no_moh: bool,
    /// How products multiply.
    #[arg(long)]
    dtype: Option<String>,
    /// Threads (0 = all cores).
    #[arg(long)]
    threads: Option<usize>,
    /// How long to time.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Change a key of the preset's run, dotted: --set model.hidden_size=512 (repeatable).
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Documents in the batch.
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of each document.
    #[arg(long)]
    seq: Option<usize>,
    /// Size of the vocabulary.
    #[arg(long)]
    vocab: Option<usize>,
    /// Leave out the machine's peak and the share of it.
    #[arg(long)]
    no_peak: bool,
    /// Show where the time goes, op by op, and write the spans of some steps as a Chrome trace.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "profile.json")]
    profile: Option<PathBuf>,
    /// One JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

impl BenchArgs {
    fn run(self) -> Result<u8, TrainError> {
        let mut sets = self.sets;
        sets.extend(self.threads.map(|threads| format!("threads={threads}")));
        sets.extend(self.dtype.map(|dtype| format!("dtype={}", json!(dtype))));
        let options = train::bench::Options {
            preset: self.preset,
            position: self.pos,
            dense: self.dense,
            no_moh: self.no_moh,
            sets,
            batch: self.batch,
            seq: self.seq,
            vocab: self.vocab,
            seconds: self.seconds,
            no_peak: self.no_peak,
        };
        let (mut report, profile) = train::bench::bench(&options, self.profile.is_some())?;
        if let (Some(path), Some(profile)) = (&self.profile, &profile) {
            train::bench::write_trace(profile, path)?;
            if self.json {
                report.insert("profile".into(), json!(profile.rows()));
            } else {
                println!("{}trace: {}\n", profile.table(), path.display());
            }
        }
        match self.json {
            true => println!("{}", Value::Object(report)),
            false => print_table(&report),
        }
        Ok(0)
    }
}

impl LrFindArgs {
    fn run(self) -> Result<u8, TrainError> {
        let run = Run::load(&self.run, &self.sets).map_err(|error| TrainError::Usage(error.to_string()))?;
        let mut find = train::trainer::LrFind::new(run)?;
        while find.advance()? {}
        let mut report = find.report();
        if self.json {
            println!("{}", Value::Object(report));
            return Ok(0);
        }
        println!("{:>12}  {:>10}  {:>10}", "rate", "loss", "smoothed");
        for point in find.points() {
            println!("{:>12.3e}  {:>10.4}  {:>10.4}", point.learning_rate, point.loss, point.smoothed);
        }
        println!();
        report.remove("points");
        for probe in report.remove("probes").iter().filter_map(Value::as_array).flatten() {
            let loss = probe["loss"].as_f64().map_or("diverged".to_owned(), |loss| format!("loss {loss:.4}"));
            println!("at {:.3e} throughout: {loss}", probe["learning_rate"].as_f64().unwrap_or(f64::NAN));
        }
        for rate in ["lowest_rate", "steepest_rate", "suggestion", "own_rate"] {
            if let Some(value) = report.get_mut(rate).filter(|value| value.is_f64()) {
                *value = json!(format!("{:.3e}", value.as_f64().unwrap_or(f64::NAN)));
            }
        }
        print_table(&report);
        Ok(0)
    }
}

impl TrainArgs {
    /// The flags as `--set` pairs, after the explicit ones: a flag beats the file.
    fn sets(&self) -> Vec<String> {
        let mut sets = self.sets.clone();
        sets.extend(self.seed.map(|seed| format!("seed={seed}")));
        sets.extend(self.threads.map(|threads| format!("threads={threads}")));
        for (key, value) in [("engine", &self.engine), ("device", &self.device), ("dtype", &self.dtype)] {
            sets.extend(value.as_ref().map(|value| format!("{key}={}", json!(value))));
        }
        sets
    }

    fn load(&self) -> Result<Run, TrainError> {
        let mut run = Run::load(&self.run, &self.sets()).map_err(|error| TrainError::Usage(error.to_string()))?;
        if self.quick {
            run.quick();
        }
        Ok(run)
    }
}

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("error: internal error ({info}); please report it with the run file")
    }));
    let cli = Cli::parse();
    match std::panic::catch_unwind(|| run(cli)) {
        Ok(Ok(status)) => ExitCode::from(status),
        Ok(Err(error)) => {
            for line in error.to_string().lines() {
                eprintln!("error: {}", shown(line));
            }
            ExitCode::from(error.exit_status())
        }
        Err(_) => ExitCode::from(1),
    }
}

fn run(cli: Cli) -> Result<u8, TrainError> {
    train::inspect::check_machine()?;
    match cli.verb {
        Some(Verb::Resume { run, engine, device, dtype, json }) => {
            let device = device.or_else(|| engine.as_ref().map(|_| "cpu".to_owned()));
            let place = [("engine", engine), ("device", device), ("dtype", dtype)];
            let place = place.into_iter().filter_map(|(key, value)| Some((key.to_owned(), json!(value?))));
            let place: Vec<_> = place.collect();
            let signals = Signals::register()?;
            return train(Trainer::resume_moved(&run, &place)?, &signals, json);
        }
        Some(Verb::Reproduce { run, out, json }) => return reproduce(&run, out.as_deref(), json),
        Some(Verb::Bench(bench)) => return bench.run(),
        Some(Verb::LrFind(find)) => return find.run(),
        Some(Verb::Config { form: Form::Schema }) => return print(&Run::schema_json()),
        Some(Verb::Config { form: Form::Docs }) => return print(Run::docs().trim_end()),
        None => {}
    }
    let run = cli.train.load()?;
    if cli.train.check {
        let plan = train::trainer::plan(&run)?;
        match cli.train.json {
            true => println!("{}", Value::Object(plan)),
            false => print_table(&plan),
        }
        return Ok(0);
    }
    let signals = Signals::register()?;
    train(Trainer::new(run, cli.train.out.as_deref(), None)?, &signals, cli.train.json)
}

/// What the system asked for. SIGINT and SIGTERM: end after this step and a whole checkpoint; a second one ends the process at once. SIGUSR1: save
/// now and go on.
struct Signals {
    stop: Arc<AtomicUsize>,
    save: Arc<AtomicBool>,
}

impl Signals {
    fn register() -> Result<Self, TrainError> {
        use signal_hook::{consts, flag};
        let signals = Signals { stop: Arc::default(), save: Arc::default() };
        let again = Arc::new(AtomicBool::new(false));
        let register = || -> std::io::Result<()> {
            for number in [consts::SIGINT, consts::SIGTERM] {
                flag::register_conditional_shutdown(number, 128 + number, again.clone())?;
                flag::register(number, again.clone())?;
                flag::register_usize(number, signals.stop.clone(), number as usize)?;
            }
            flag::register(consts::SIGUSR1, signals.save.clone())?;
            Ok(())
        };
        register().map_err(|error| TrainError::Failed(format!("the system refused a signal handler: {error}")))?;
        Ok(signals)
    }
}

/// One text on stdout; a reader that has gone (head, less) is no failure.
fn print(text: &str) -> Result<u8, TrainError> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}

/// Trains the run in `path` again and compares. Exit status 1 if a byte differs.
fn reproduce(path: &Path, out: Option<&Path>, json: bool) -> Result<u8, TrainError> {
    let original = Original::read(path)?;
    let signals = Signals::register()?;
    let (trainer, status) = finish(Trainer::new(original.run.clone(), out, None)?, &signals)?;
    if status != 0 {
        return Ok(status);
    }
    let report = original.compare(trainer.out())?;
    match json {
        true => println!("{}", report.json()),
        false => println!("{}", shown(&report.to_string())),
    }
    Ok(u8::from(!report.identical))
}

/// Runs to the end and prints the results.
fn train(trainer: Trainer, signals: &Signals, json: bool) -> Result<u8, TrainError> {
    let (trainer, status) = finish(trainer, signals)?;
    if status != 0 {
        return Ok(status);
    }
    let results = trainer.results().clone();
    if json {
        println!("{}", Value::Object(results));
    } else {
        print_results(&trainer, &results);
    }
    Ok(0)
}

/// Runs to the end, or to where a signal ends it. With the exit status. A thread of the pool runs all of it: entering the pool for every update would wake
/// one each time. libtorch has threads of its own.
fn finish(trainer: Trainer, signals: &Signals) -> Result<(Trainer, u8), TrainError> {
    match trainer.pool() {
        Some(pool) => pool.install(|| go_on(trainer, signals)),
        None => go_on(trainer, signals),
    }
}

fn go_on(mut trainer: Trainer, signals: &Signals) -> Result<(Trainer, u8), TrainError> {
    for note in trainer.notes() {
        eprintln!("{}", shown(note));
    }
    eprintln!("run {} in {}", trainer.id(), trainer.out().display());
    let mut progress = Progress::new(&trainer);
    while let Some(row) = trainer.next_row()? {
        progress.show(&row);
        if signals.save.swap(false, Ordering::Relaxed) {
            trainer.save_soon()?;
        }
        let number = signals.stop.load(Ordering::Relaxed);
        if number != 0 {
            progress.bar.finish_and_clear();
            trainer.stop("interrupted")?;
            eprintln!(
                "checkpoint at step {} is complete; go on with: moe-lab resume {}",
                trainer.step_count(),
                trainer.out().display()
            );
            return Ok((trainer, 128 + number as u8));
        }
    }
    progress.bar.finish_and_clear();
    Ok((trainer, 0))
}

/// Events that a person should see.
const ALERTS: [&str; 11] = [
    "alert",
    "collapse",
    "checkpoint_failed",
    "slow_save",
    "disk",
    "fault",
    "spike",
    "skipped",
    "rolled_back",
    "early_stop",
    "low_rate",
];

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    terminal: bool,
    last: Instant,
    latest: String,
}

impl Progress {
    fn new(trainer: &Trainer) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(trainer.total_steps()) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{bar:24} {percent:>3} %  eta {eta}  step {pos}/{len}  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(trainer.step_count());
        bar.reset_eta();
        Progress { bar, terminal, last: Instant::now(), latest: String::new() }
    }

    fn show(&mut self, row: &Row) {
        let fields = row.fields();
        let number = |name: &str| fields.get(name).and_then(Value::as_f64);
        let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
        if let Some(step) = fields.get("step").and_then(Value::as_u64) {
            self.bar.set_position(step);
        }
        if text("kind") == "event" && ALERTS.contains(&text("event")) {
            self.bar.suspend(|| eprintln!("warning: {}", shown(text("message"))));
        }
        if let Some(loss) = number("epoch/loss").or(number("eval/loss")) {
            let epoch = fields.get("epoch").and_then(Value::as_u64).unwrap_or_default();
            let floor = number("epoch/floor").map(|floor| format!(" (floor {floor:.4})")).unwrap_or_default();
            self.latest = format!("{} epoch {epoch}: loss {loss:.4}{floor}", text("phase"));
            self.bar.set_message(self.latest.clone());
            if !self.terminal && self.last.elapsed() > Duration::from_secs(5) {
                self.last = Instant::now();
                eprintln!("{}", self.latest);
            }
        }
    }
}

fn print_results(trainer: &Trainer, results: &Map<String, Value>) {
    print_table(results);
    if let Some((prompt, answer)) = trainer.first_answer() {
        println!("\n{}\n  -> {}", shown(&prompt), shown(&answer));
    }
    println!("\nrun directory: {}", trainer.out().display());
}

/// Two columns; unknown values are left out.
fn print_table(values: &Map<String, Value>) {
    let width = values.keys().map(String::len).max().unwrap_or(0);
    for (name, value) in values.iter().filter(|(_, value)| !value.is_null()) {
        let shown = match value {
            Value::Number(n) if n.is_f64() => {
                let x = n.as_f64().unwrap_or(f64::NAN);
                if x.abs() >= 1e5 || x == x.trunc() { format!("{x:.0}") } else { format!("{x:.4}") }
            }
            Value::String(text) => shown(text),
            other => other.to_string(),
        };
        println!("{name:width$}  {shown}");
    }
}
