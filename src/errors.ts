/** What went wrong, for programs; `message` is one clear sentence for people. */
export type ErrorCode =
  /** A file is not what it claims to be: truncated, malformed, or with values no model can have. */
  | 'bad-file'
  /** A well-formed file of a model this package does not run. */
  | 'unsupported-model'
  /** A part of the model (encoder, transformer, VAE, tokenizer) or a tensor of it is missing. */
  | 'missing-part'
  /** An option is out of range, or two options contradict each other. */
  | 'bad-option'
  /** The requested device cannot be used on this machine. */
  | 'device-unavailable'
  /** Reading or writing failed: permissions, a full disk, a path that does not exist. */
  | 'io'
  /** The model produced values that are not finite. */
  | 'not-finite';

/**
 * The error this package throws for everything a user can mend. `message` names the input and the remedy.
 * An aborted call throws the `AbortSignal`'s own reason instead, as web APIs do.
 */
export class MmditxError extends Error {
  override readonly name = 'MmditxError';
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}
