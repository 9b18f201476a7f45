//! Language models and text encoders.

use std::path::PathBuf;
use std::sync::Mutex;

use layerstore::layer::{Accuracy, ActivationFormat};
use layerstore::{
    CacheType, Cancel, ChatMessage, EncodingOptions, Error, GenerationOptions, LanguageModel as Model, Pooling,
    Sampling, SpeedOptions, TextEncoder as Encoder,
};
use numpy::{IntoPyArray, PyArray2};
use pyo3::prelude::*;
use serde_json::Value;

use crate::convert::{json, plain};
use crate::errors::{OrRaise, invalid};
use crate::runtime::{compute, work};

/// How tokens are chosen, checked.
fn sampling(py: Python<'_>, temperature: f32, top_k: usize, top_p: f32, seed: u64) -> PyResult<Sampling> {
    if !(temperature >= 0.0 && temperature.is_finite()) {
        return Err(invalid(py, "temperature", temperature, "0 or more"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(invalid(py, "top_p", top_p, "above 0, and 1 at most"));
    }
    Ok(Sampling { temperature, top_k, top_p, seed })
}

/// Reads a value by its name in JSON.
fn named<T: serde::de::DeserializeOwned>(py: Python<'_>, what: &str, name: &str, expected: &str) -> PyResult<T> {
    serde_json::from_value(Value::String(name.to_owned())).map_err(|_| invalid(py, what, format!("'{name}'"), expected))
}

fn cache_type(py: Python<'_>, name: &str) -> PyResult<CacheType> {
    named(py, "cache", name, "'f32', 'f16' or 'int8'")
}

fn accuracy(exact: bool) -> Accuracy {
    if exact { Accuracy::Full } else { Accuracy::Approximate }
}

fn activations(py: Python<'_>, name: &str) -> PyResult<ActivationFormat> {
    named(py, "activations", name, "'f32' or 'int8'")
}

/// A language model of a snapshot, loaded and ready to run.
#[pyclass(frozen, module = "layerstore")]
pub struct LanguageModel {
    model: Model,
    name: String,
}

impl LanguageModel {
    /// Wraps a model.
    pub fn new(model: Model, name: &str) -> Self {
        LanguageModel { model, name: name.to_owned() }
    }

    /// Tokens of a text, a list of messages (`{"role": ..., "content": ...}`), or tokens as they are.
    fn prompt(&self, prompt: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let py = prompt.py();
        if let Ok(text) = prompt.extract::<String>() {
            return self.model.tokens(&text).or_raise(py);
        }
        if let Ok(tokens) = prompt.extract::<Vec<u32>>() {
            return Ok(tokens);
        }
        let messages: Vec<ChatMessage> = serde_json::from_value(json(prompt)?)
            .map_err(|e| invalid(py, "prompt", e, "a text, tokens, or a list of messages with role and content"))?;
        self.model.chat_tokens(&messages).or_raise(py)
    }
}

#[pymethods]
impl LanguageModel {
    /// Goes on with a prompt: a text, tokens, or a list of messages (`{"role": ..., "content": ...}`), which the model's chat template
    /// makes a prompt of. Returns a dictionary with `text`, `tokens`, `prompt_tokens`, `ended` and the seconds that it took.
    ///
    /// At `temperature` 0 the likeliest token is taken. `stream` is called with each piece of text as it comes. `session` goes on in a
    /// session, which keeps keys and values. Ctrl-C stops between two tokens.
    #[pyo3(signature = (prompt, *, max_tokens = 128, temperature = 0.0, top_k = 0, top_p = 1.0, seed = 0, cache = "f16", exact = false, stream = None, session = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn generate<'py>(
        &self,
        py: Python<'py>,
        prompt: &Bound<'py, PyAny>,
        max_tokens: usize,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        seed: u64,
        cache: &str,
        exact: bool,
        stream: Option<Py<PyAny>>,
        session: Option<&Session>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let tokens = self.prompt(prompt)?;
        let cancel = Cancel::new();
        let options = GenerationOptions {
            max_tokens,
            sampling: sampling(py, temperature, top_k, top_p, seed)?,
            accuracy: accuracy(exact),
            cache: cache_type(py, cache)?,
            cancel: cancel.clone(),
        };
        let mut raised = None;
        let done = work(py, &cancel, || {
            let each = |piece: &str| {
                let Some(stream) = &stream else { return };
                if raised.is_none()
                    && let Err(error) = Python::attach(|py| stream.call1(py, (piece,)).map(|_| ()))
                {
                    cancel.cancel();
                    raised = Some(error);
                }
            };
            match session {
                Some(session) => {
                    let Ok(mut session) = session.inner.try_lock() else {
                        return Err(Error::expected("session", "one that is being gone on in", "one at rest"));
                    };
                    self.model.generate_in(&mut session, &tokens, &options, each)
                }
                None => self.model.generate(&tokens, &options, each),
            }
        });
        raised.map_or(Ok(()), Err)?;
        plain(py, &done?)
    }

    /// Goes on with several prompts at once; each weight is read once for a token of all of them. Returns a list like `generate`'s.
    #[pyo3(signature = (prompts, *, max_tokens = 128, temperature = 0.0, top_k = 0, top_p = 1.0, seed = 0, cache = "f16", exact = false))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn generate_all<'py>(
        &self,
        py: Python<'py>,
        prompts: Vec<Bound<'py, PyAny>>,
        max_tokens: usize,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        seed: u64,
        cache: &str,
        exact: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let prompts = prompts.iter().map(|prompt| self.prompt(prompt)).collect::<PyResult<Vec<_>>>()?;
        let cancel = Cancel::new();
        let options = GenerationOptions {
            max_tokens,
            sampling: sampling(py, temperature, top_k, top_p, seed)?,
            accuracy: accuracy(exact),
            cache: cache_type(py, cache)?,
            cancel: cancel.clone(),
        };
        plain(py, &work(py, &cancel, || self.model.generate_all(&prompts, &options, |_, _| {}))?)
    }

    /// Returns the logits `[tokens, vocabulary]` of what follows each token of a prompt, as `generate` takes it.
    #[pyo3(signature = (prompt, *, exact = false))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        prompt: &Bound<'py, PyAny>,
        exact: bool,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let tokens = self.prompt(prompt)?;
        let cancel = Cancel::new();
        Ok(work(py, &cancel, || self.model.logits(&tokens, accuracy(exact)))?.into_pyarray(py))
    }

    /// Measures the perplexity of a text in windows of `window` tokens, and with `against` the Kullback-Leibler divergence from another
    /// model of the same tokens. Returns a dictionary.
    #[pyo3(signature = (text, *, window = 512, against = None, exact = false, max_tokens = None))]
    fn perplexity<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        window: usize,
        against: Option<&LanguageModel>,
        exact: bool,
        max_tokens: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut tokens = self.prompt(text)?;
        tokens.truncate(max_tokens.unwrap_or(usize::MAX));
        let (cancel, against) = (Cancel::new(), against.map(|other| &other.model));
        let measure = || self.model.perplexity(&tokens, window, against, accuracy(exact), &cancel, |_, _| {});
        plain(py, &work(py, &cancel, measure)?)
    }

    /// Measures tokens per second of prompts of `prompt` tokens, and of `generated` tokens one by one. Returns a dictionary.
    #[pyo3(signature = (*, prompt = 512, generated = 128, rounds = 5, cache = "f16"))]
    fn bench<'py>(
        &self,
        py: Python<'py>,
        prompt: usize,
        generated: usize,
        rounds: usize,
        cache: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (cancel, cache) = (Cancel::new(), cache_type(py, cache)?);
        let options =
            SpeedOptions { prompt, generated, rounds, cache, cancel: cancel.clone(), ..SpeedOptions::default() };
        plain(py, &work(py, &cancel, || self.model.speed(&options))?)
    }

    /// Returns a session of no tokens, which `generate` goes on in; keys and values are kept as `cache`.
    #[pyo3(signature = (*, cache = "f16"))]
    fn session(&self, py: Python<'_>, cache: &str) -> PyResult<Session> {
        Ok(Session { inner: Mutex::new(self.model.session(cache_type(py, cache)?)) })
    }

    /// Opens a session that `Session.save` wrote.
    fn open_session(&self, py: Python<'_>, path: PathBuf) -> PyResult<Session> {
        Ok(Session { inner: Mutex::new(compute(py, || self.model.open_session(&path))?) })
    }

    /// Returns the same model with its packed layers' inputs as `'f32'` or rounded to `'int8'`, which is faster.
    fn with_activations(&self, py: Python<'_>, activations: &str) -> PyResult<Self> {
        let model = self.model.with_activations(self::activations(py, activations)?).or_raise(py)?;
        Ok(LanguageModel { model, name: self.name.clone() })
    }

    /// Returns the tokens of a text.
    fn tokens(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        self.model.tokens(text).or_raise(py)
    }

    /// Returns the text of tokens.
    fn text(&self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<String> {
        self.model.text(&tokens).or_raise(py)
    }

    /// The longest text that the model was made for, in tokens; `None` where its configuration does not say it.
    #[getter]
    fn context(&self) -> Option<usize> {
        self.model.context()
    }

    /// The number of tokens that the model knows.
    #[getter]
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    /// Bytes that the layers take in memory.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.model.memory_bytes()
    }

    fn __repr__(&self) -> String {
        format!("<layerstore.LanguageModel {}, {} bytes in memory>", self.name, self.model.memory_bytes())
    }
}

/// A text that a language model has read: its tokens, and their keys and values.
#[pyclass(frozen, module = "layerstore")]
pub struct Session {
    inner: Mutex<layerstore::Session>,
}

impl Session {
    fn locked(&self) -> std::sync::MutexGuard<'_, layerstore::Session> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[pymethods]
impl Session {
    /// Writes the session to a file, which appears whole or not at all.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        compute(py, || self.locked().save(&path))
    }

    /// The text's tokens.
    #[getter]
    fn tokens(&self, py: Python<'_>) -> Vec<u32> {
        py.detach(|| self.locked().tokens().to_vec())
    }

    /// Bytes that keys and values take.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.locked().memory_bytes())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<layerstore.Session of {} tokens>", self.tokens(py).len())
    }
}

/// A text encoder of a snapshot, loaded and ready to run.
#[pyclass(frozen, module = "layerstore")]
pub struct TextEncoder {
    encoder: Encoder,
    name: String,
}

impl TextEncoder {
    /// Wraps an encoder.
    pub fn new(encoder: Encoder, name: &str) -> Self {
        TextEncoder { encoder, name: name.to_owned() }
    }
}

#[pymethods]
impl TextEncoder {
    /// Returns a vector for each text, `[texts, features]`; for one text, `[features]`.
    #[pyo3(signature = (texts, *, exact = false))]
    fn encode<'py>(&self, py: Python<'py>, texts: &Bound<'py, PyAny>, exact: bool) -> PyResult<Bound<'py, PyAny>> {
        let one = texts.extract::<String>();
        let is_one = one.is_ok();
        let texts: Vec<String> = one.map_or_else(|_| texts.extract(), |text| Ok(vec![text]))?;
        let cancel = Cancel::new();
        let options = EncodingOptions { accuracy: accuracy(exact), cancel: cancel.clone() };
        let vectors = work(py, &cancel, || self.encoder.encode(&texts, &options, |_| {}))?;
        Ok(match is_one {
            true => vectors.row(0).to_owned().into_pyarray(py).into_any(),
            false => vectors.into_pyarray(py).into_any(),
        })
    }

    /// Returns the same encoder, which makes one vector of a text's tokens by `'mean'`, `'cls'` or `'last'`.
    fn with_pooling(&self, py: Python<'_>, pooling: &str) -> PyResult<Self> {
        let pooling = match pooling {
            "mean" => Pooling::Mean,
            "cls" => Pooling::Cls,
            "last" => Pooling::Last,
            other => return Err(invalid(py, "pooling", format!("'{other}'"), "'mean', 'cls' or 'last'")),
        };
        Ok(TextEncoder { encoder: self.encoder.with_pooling(pooling), name: self.name.clone() })
    }

    /// Returns the same encoder, whose vectors have length 1 or not.
    fn with_normalize(&self, normalize: bool) -> Self {
        TextEncoder { encoder: self.encoder.with_normalize(normalize), name: self.name.clone() }
    }

    /// Returns the same encoder with its packed layers' inputs as `'f32'` or rounded to `'int8'`, which is faster.
    fn with_activations(&self, py: Python<'_>, activations: &str) -> PyResult<Self> {
        let encoder = self.encoder.with_activations(self::activations(py, activations)?).or_raise(py)?;
        Ok(TextEncoder { encoder, name: self.name.clone() })
    }

    /// Returns the tokens of a text.
    fn tokens(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        self.encoder.tokens(text).or_raise(py)
    }

    /// The length of a vector.
    #[getter]
    fn features(&self) -> usize {
        self.encoder.features()
    }

    /// Bytes that the layers take in memory.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.encoder.memory_bytes()
    }

    fn __repr__(&self) -> String {
        format!("<layerstore.TextEncoder {}, {} features>", self.name, self.encoder.features())
    }
}
