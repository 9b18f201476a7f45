//! What is said of an object store beside its address, and clients made from it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Debug, Display, Formatter};
use std::time::Duration;

use object_store::RetryConfig;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey as Key, S3ConditionalPut};
use object_store::client::ClientConfigKey;

use super::http::Connector;

/// How long a request is repeated that nobody answers, or that is refused for now.
const PATIENCE: Duration = Duration::from_secs(45);

/// The options that there are.
const KNOWN: &[&str] = &[
    "access_key_id",
    "secret_access_key",
    "session_token",
    "region",
    "endpoint",
    "allow_http",
    "virtual_hosted_style_request",
    "skip_signature",
    "request_payer",
    "unsigned_payload",
    "checksum_algorithm",
    "disable_tagging",
    "disable_bulk_delete",
    "server_side_encryption",
    "sse_kms_key_id",
    "sse_bucket_key_enabled",
    "sse_customer_key_base64",
    "web_identity_token_file",
    "role_arn",
    "role_session_name",
    "endpoint_url_sts",
    "container_credentials_relative_uri",
    "container_credentials_full_uri",
    "container_authorization_token_file",
    "metadata_endpoint",
    "imdsv1_fallback",
];

/// Options of an object store: its endpoint, its region, credentials. Values are shown nowhere.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StorageOptions(BTreeMap<String, String>);

impl StorageOptions {
    /// Returns no options.
    pub fn new() -> Self {
        StorageOptions::default()
    }

    /// Returns the options with one more, or with another value of the one by this name.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.insert(key.into(), value.into());
        self
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the options' names.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for StorageOptions {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        StorageOptions(pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }
}

impl Debug for StorageOptions {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Display for StorageOptions {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.keys().collect::<Vec<_>>().join(", "))
    }
}

/// Returns two clients of a bucket by these options, and by the environment's `AWS_…` variables where they say nothing, over the same
/// connections: one that repeats requests, and one that makes each of them once.
///
/// # Errors
/// When an option is unknown or does not fit, or nothing says which credentials to take. No error holds an option's value.
pub fn s3_and_once(bucket: &str, options: &StorageOptions) -> Result<(AmazonS3, AmazonS3), String> {
    let connector = Connector::default();
    let make = |retry| client(bucket, std::env::vars_os(), options, &connector, retry);
    let repeating = RetryConfig { retry_timeout: PATIENCE, ..RetryConfig::default() };
    let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    Ok((make(repeating)?, make(once)?))
}

/// Returns a client of a bucket by an environment and options.
///
/// # Errors
/// As [`s3_and_once`].
pub fn client<K: AsRef<std::ffi::OsStr>, V: AsRef<std::ffi::OsStr>>(
    bucket: &str,
    environment: impl IntoIterator<Item = (K, V)>,
    options: &StorageOptions,
    connector: &Connector,
    retry: RetryConfig,
) -> Result<AmazonS3, String> {
    let settings = settings(environment, options)?;
    let truth =
        |key| settings.get(key).is_some_and(|value| ["1", "true", "on", "yes", "y"].contains(&&*value.to_lowercase()));
    if bucket.ends_with("--x-s3") || truth(&Key::S3Express) {
        return Err(format!("{bucket}: directory buckets (S3 Express) do not list in order, and are not supported"));
    }
    let endpoint = settings.get(&Key::S3Endpoint).or_else(|| settings.get(&Key::Endpoint)).map_or("", String::as_str);
    if endpoint.contains('@') {
        return Err("the endpoint holds a user name: use the options access_key_id and secret_access_key".into());
    }
    if !endpoint.is_empty() && !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
        return Err("the endpoint is no address that begins with http:// or https://".into());
    }
    if !truth(&Key::SkipSignature) && !has_credentials(&settings) {
        return Err(no_credentials());
    }
    if settings.contains_key(&Key::AccessKeyId) != settings.contains_key(&Key::SecretAccessKey) {
        return Err("access_key_id and secret_access_key are taken together, from options or from the environment: one of them is \
                    missing"
            .into());
    }
    // They go into headers.
    if let Some((key, _)) = settings.iter().find(|(_, value)| value.chars().any(char::is_control)) {
        return Err(format!("{} holds a control character, as a line's end", key.as_ref()));
    }
    let plain = endpoint.starts_with("http://");
    let builder =
        settings.iter().fold(AmazonS3Builder::new(), |builder, (&key, value)| builder.with_config(key, value));
    let builder = builder
        .with_bucket_name(bucket)
        .with_allow_http(plain)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_http_connector(connector.clone())
        .with_retry(retry);
    builder.build().map_err(|e| without_values(e.to_string(), &settings))
}

/// Returns all settings: options, then what the environment says.
fn settings<K: AsRef<std::ffi::OsStr>, V: AsRef<std::ffi::OsStr>>(
    environment: impl IntoIterator<Item = (K, V)>,
    options: &StorageOptions,
) -> Result<HashMap<Key, String>, String> {
    let mut settings = HashMap::new();
    for (name, value) in environment {
        let (Some(name), Some(value)) = (name.as_ref().to_str(), value.as_ref().to_str()) else { continue };
        if name == "AWS_EC2_METADATA_SERVICE_ENDPOINT" && !value.is_empty() {
            settings.entry(Key::MetadataEndpoint).or_insert_with(|| value.to_owned());
        }
        let Some(Ok(key)) = name.strip_prefix("AWS_").map(|name| name.to_ascii_lowercase().parse::<Key>()) else {
            continue;
        };
        if is_ours(key) && !value.is_empty() {
            settings.insert(key, value.to_owned());
        }
    }
    let chosen: Vec<(Key, &String)> = options
        .0
        .iter()
        .map(|(name, value)| match name.to_ascii_lowercase().parse() {
            Ok(key) if is_ours(key) => Ok((key, value)),
            _ => Err(format!("there is no storage option {name:?}; there are {}", KNOWN.join(", "))),
        })
        .collect::<Result<_, _>>()?;
    for (key, _) in &chosen {
        // What the environment says together is replaced together.
        let others: &[Key] = match key {
            Key::AccessKeyId | Key::SecretAccessKey => &[Key::AccessKeyId, Key::SecretAccessKey, Key::Token],
            Key::WebIdentityTokenFile
            | Key::ContainerCredentialsRelativeUri
            | Key::ContainerCredentialsFullUri
            | Key::MetadataEndpoint => &[Key::AccessKeyId, Key::SecretAccessKey, Key::Token],
            Key::Endpoint => &[Key::S3Endpoint],
            Key::DefaultRegion => &[Key::Region],
            _ => &[],
        };
        others.iter().for_each(|key| {
            settings.remove(key);
        });
    }
    settings.extend(chosen.into_iter().map(|(key, value)| (key, value.clone())));
    Ok(settings)
}

/// Whether a setting of object_store is one here: not those that would name another bucket, make puts unconditional, or are of an
/// HTTP client that is not used.
fn is_ours(key: Key) -> bool {
    match key {
        Key::Bucket | Key::ConditionalPut | Key::CopyIfNotExists => false,
        Key::Client(key) => key == ClientConfigKey::AllowHttp,
        _ => true,
    }
}

/// Whether something says where credentials are to be had. Machines on EC2 can be asked for theirs, but everywhere else the question
/// takes minutes: it has to be asked for.
fn has_credentials(settings: &HashMap<Key, String>) -> bool {
    let all = |keys: &[Key]| keys.iter().all(|key| settings.contains_key(key));
    all(&[Key::AccessKeyId])
        || all(&[Key::SecretAccessKey])
        || all(&[Key::WebIdentityTokenFile, Key::RoleArn])
        || all(&[Key::ContainerCredentialsRelativeUri])
        || all(&[Key::ContainerCredentialsFullUri, Key::ContainerAuthorizationTokenFile])
        || all(&[Key::MetadataEndpoint])
}

fn no_credentials() -> String {
    "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or the options access_key_id and \
     secret_access_key; AWS_WEB_IDENTITY_TOKEN_FILE with AWS_ROLE_ARN, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, and \
     AWS_CONTAINER_CREDENTIALS_FULL_URI with AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE are followed, profiles (AWS_PROFILE, ~/.aws) \
     are not; on EC2, AWS_METADATA_ENDPOINT=http://169.254.169.254 takes the machine's role; skip_signature=true reads a \
     public bucket"
        .into()
}

/// Returns a message without the settings' values, which some of object_store's quote.
fn without_values(message: String, settings: &HashMap<Key, String>) -> String {
    settings
        .values()
        .filter(|value| value.len() > 2)
        .fold(message, |message, value| message.replace(value.as_str(), "…"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [(&str, &str); 2] =
        [("AWS_ACCESS_KEY_ID", "environment-id"), ("AWS_SECRET_ACCESS_KEY", "environment-secret")];

    fn made(environment: &[(&str, &str)], options: &StorageOptions) -> Result<AmazonS3, String> {
        client("bucket", environment.iter().copied(), options, &Connector::default(), RetryConfig::default())
    }

    #[test]
    fn values_are_not_shown() {
        let options = StorageOptions::new().with("secret_access_key", "hidden").with("region", "eu-north-1");
        assert_eq!(format!("{options:?}"), r#"{"region", "secret_access_key"}"#);
        assert_eq!(options.to_string(), "region, secret_access_key");
    }

    #[test]
    fn options_stand_before_the_environment() {
        let environment = [
            KEYS[0],
            KEYS[1],
            ("AWS_SESSION_TOKEN", "environment-token"),
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ENDPOINT_URL_S3", "http://environment"),
            ("AWS_CONDITIONAL_PUT", "disabled"),
            ("AWS_ROLE_ARN", ""),
            ("HOME", "/root"),
        ];
        let of = |options: StorageOptions| settings(environment, &options).unwrap();
        let plain = of(StorageOptions::new());
        assert_eq!(plain[&Key::Region], "eu-west-1");
        assert_eq!(plain[&Key::Token], "environment-token");
        assert!(!plain.contains_key(&Key::ConditionalPut) && !plain.contains_key(&Key::RoleArn));
        let options = StorageOptions::new()
            .with("aws_access_key_id", "id")
            .with("SECRET_ACCESS_KEY", "secret")
            .with("endpoint", "http://option")
            .with("default_region", "eu-north-1");
        let both = of(options);
        assert_eq!(both[&Key::AccessKeyId], "id");
        assert_eq!(both[&Key::Endpoint], "http://option");
        for gone in [Key::Token, Key::S3Endpoint, Key::Region] {
            assert!(!both.contains_key(&gone), "{gone:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let with = |key: &str, value: &str| made(&KEYS, &StorageOptions::new().with(key, value)).unwrap_err();
        for unknown in ["acces_key", "bucket", "conditional_put", "timeout", "proxy_url"] {
            let error = with(unknown, "value-of-it");
            assert!(
                error.starts_with(&format!("there is no storage option {unknown:?}; there are access_key_id,")),
                "{error}"
            );
            assert!(!error.contains("value-of-it"));
        }
        for (key, value) in [("endpoint", "http://me:pass@host"), ("endpoint", "host:9000"), ("skip_signature", "pass")]
        {
            let error = with(key, value);
            assert!(!error.contains("pass") && !error.contains("host"), "{error}");
        }
        let half = made(&[KEYS[0]], &StorageOptions::new()).unwrap_err();
        assert!(half.contains("SecretAccessKey") || half.contains("secret"), "{half}");
        assert!(
            client("b--eun1-az1--x-s3", KEYS, &StorageOptions::new(), &Connector::default(), RetryConfig::default())
                .is_err()
        );
        for known in KNOWN {
            let key: Key = known.parse().unwrap();
            assert!(is_ours(key), "{known}");
        }
    }

    #[test]
    fn without_credentials_nobody_is_asked() {
        let error = made(&[("AWS_REGION", "eu-west-1")], &StorageOptions::new()).unwrap_err();
        assert!(error.contains("AWS_ACCESS_KEY_ID") && error.contains("AWS_WEB_IDENTITY_TOKEN_FILE"), "{error}");
        made(&KEYS, &StorageOptions::new()).unwrap();
        made(&[], &StorageOptions::new().with("skip_signature", "true")).unwrap();
        made(&[], &StorageOptions::new().with("metadata_endpoint", "http://127.0.0.1:1")).unwrap();
        made(&[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/role")], &StorageOptions::new()).unwrap();
    }
}
