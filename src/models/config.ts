/**
 * The facts of the Stable Diffusion 3 family: the shape of each network, the constants they share, and the
 * configurations of the released models. Configurations of a given file are derived from its tensors
 * (`weights/configs.ts`); the released ones stand here to name a model and to test against.
 */

/** MMDiT-X, the diffusion transformer (SD3 paper, arXiv 2403.03206, section 4; SD3.5 adds dual attention). */
export interface TransformerConfig {
  /** Width of both token streams. */
  readonly hiddenSize: number;
  /** Number of joint blocks. */
  readonly depth: number;
  readonly heads: number;
  /** `hiddenSize / heads`. */
  readonly headDim: number;
  /** Hidden width of the blocks' MLPs. */
  readonly mlpHidden: number;
  /** Side of the square of latent pixels that makes one token. */
  readonly patchSize: number;
  /** Channels of the latent that goes in. */
  readonly inChannels: number;
  /** Channels of the velocity that comes out. */
  readonly outChannels: number;
  /** Width of the text context, the T5 width. */
  readonly contextWidth: number;
  /** Width of the pooled text vector, CLIP-L's plus CLIP-G's. */
  readonly pooledWidth: number;
  /** Number of sinusoids of the timestep embedding (cosines and sines together). */
  readonly timestepWidth: number;
  /** Side of the square table of positions, in patches: the largest picture the model can be asked for. */
  readonly tableSize: number;
  /** Indices of the blocks with a second, image-only attention; ascending. */
  readonly dualAttentionLayers: readonly number[];
  /** RMS normalisation of queries and keys per head; SD3 Medium has none. */
  readonly qkNorm: boolean;
}

/** A CLIP text encoder (Radford et al. 2021). */
export interface ClipConfig {
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  readonly mlpWidth: number;
  /** `quick_gelu` is `x * sigmoid(1.702 x)` (CLIP-L), `gelu` the exact one (CLIP-G). */
  readonly activation: 'quick_gelu' | 'gelu';
  readonly vocabSize: number;
  /** Tokens per chunk, begin and end included: 77 in the released encoders. */
  readonly positions: number;
  /** Whether the pooled vector is multiplied by `text_projection`. SD3 uses CLIP-G's and leaves CLIP-L's out. */
  readonly projection: boolean;
  /** Width of the pooled vector. */
  readonly pooledWidth: number;
  /** Token that begins a chunk. */
  readonly bosId: number;
  /** Token that ends the text; the pooled vector is read at its first occurrence. */
  readonly eosId: number;
  /** Token that fills a chunk: the end token in CLIP-L, 0 in CLIP-G. */
  readonly padId: number;
}

/** The encoder of T5 v1.1 (Raffel et al. 2020; gated GELU as in Shazeer 2020). */
export interface T5Config {
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  /** `d_kv`; `heads * headDim` need not be `width`. */
  readonly headDim: number;
  readonly mlpWidth: number;
  /** Rows of the embedding table, which may exceed the tokenizer's vocabulary. */
  readonly vocabSize: number;
  /** Tokens a prompt is padded to when nothing else is asked for. */
  readonly tokens: number;
  /** Buckets of the relative position bias, both directions together. */
  readonly buckets: number;
  /** Distance from which on all positions share the last bucket. */
  readonly maxDistance: number;
}

/** The autoencoder: latents of `latentChannels`, `2 ** (multipliers.length - 1)` times smaller than the picture. */
export interface VaeConfig {
  /** Channels at full resolution. */
  readonly channels: number;
  /** Channels of each level in units of `channels`, from full resolution down. */
  readonly multipliers: readonly number[];
  /** Residual blocks per encoder level; the decoder has one more. */
  readonly resBlocks: number;
  readonly latentChannels: number;
  readonly imageChannels: number;
  /** Groups of every GroupNorm. */
  readonly groups: number;
  /** With `latentShift`: diffusion latent = (VAE latent - shift) * scale. */
  readonly latentScale: number;
  readonly latentShift: number;
}

/** LayerNorm of the transformer, without affine parameters (Stability-AI/sd3.5, mmditx.py). */
export const TRANSFORMER_NORM_EPS = 1e-6;
/** RMSNorm of queries and keys (Stability-AI/sd3.5, mmditx.py). */
export const QK_NORM_EPS = 1e-6;
/** Longest period of the timestep sinusoids (Stability-AI/sd3.5, `TimestepEmbedder`). */
export const TIMESTEP_MAX_PERIOD = 10_000;
/** The transformer is told the timestep `1000 * sigma` (SD3 paper, section 3.1; Stability-AI/sd3.5, sd3_impls.py). */
export const TIMESTEP_SCALE = 1000;
/** Head width where no tensor tells it: SD3 Medium, which has no QK norm, and the CLIP encoders. */
export const DEFAULT_HEAD_DIM = 64;
/** LayerNorm of the CLIP encoders (their config.json). */
export const CLIP_NORM_EPS = 1e-5;
/** Factor inside the sigmoid of CLIP-L's activation (openai/CLIP, `QuickGELU`). */
export const QUICK_GELU_FACTOR = 1.702;
/** CLIP-G is padded with token 0, not with its end token (Stability-AI/sd3.5, `SDXLClipGTokenizer`). */
export const CLIP_G_PAD_ID = 0;
/** RMSNorm of T5 (its config.json). */
export const T5_NORM_EPS = 1e-6;
/** End and padding token of every T5 vocabulary (its config.json). */
export const T5_EOS_ID = 1;
export const T5_PAD_ID = 0;
/** T5's distance of the last bucket (its config.json, `relative_attention_max_distance`). */
export const T5_MAX_DISTANCE = 128;
/** Shortest T5 prompt of the reference code, which has no upper limit (Stability-AI/sd3.5, `T5XXLTokenizer`). */
export const T5_DEFAULT_TOKENS = 77;
/** GroupNorm of the VAE (Stability-AI/sd3.5, `Normalize`). */
export const VAE_NORM_EPS = 1e-6;
export const VAE_GROUPS = 32;
/** Scale and shift of the released VAE's latents (Stability-AI/sd3.5, `SD3LatentFormat`). */
export const LATENT_SCALE = 1.5305;
export const LATENT_SHIFT = 0.0609;
/** Bounds of the posterior's log-variance (CompVis/latent-diffusion, `DiagonalGaussianDistribution`). */
export const LOG_VARIANCE_RANGE = [-30, 20] as const;

/** How much smaller a latent is than its picture, per side. */
export function vaeDownscale(config: Pick<VaeConfig, 'multipliers'>): number {
  return 2 ** (config.multipliers.length - 1);
}

/** stabilityai/stable-diffusion-3.5-medium. */
export const SD35_MEDIUM_TRANSFORMER: TransformerConfig = {
  hiddenSize: 1536,
  depth: 24,
  heads: 24,
  headDim: 64,
  mlpHidden: 6144,
  patchSize: 2,
  inChannels: 16,
  outChannels: 16,
  contextWidth: 4096,
  pooledWidth: 2048,
  timestepWidth: 256,
  tableSize: 384,
  dualAttentionLayers: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
  qkNorm: true,
};

/** stabilityai/stable-diffusion-3-medium: smaller table, neither dual attention nor QK norm. */
export const SD3_MEDIUM_TRANSFORMER: TransformerConfig = {
  ...SD35_MEDIUM_TRANSFORMER,
  tableSize: 192,
  dualAttentionLayers: [],
  qkNorm: false,
};

/** stabilityai/stable-diffusion-3.5-large. */
export const SD35_LARGE_TRANSFORMER: TransformerConfig = {
  ...SD35_MEDIUM_TRANSFORMER,
  hiddenSize: 2432,
  depth: 38,
  heads: 38,
  mlpHidden: 9728,
  tableSize: 192,
  dualAttentionLayers: [],
};

/** The autoencoder of all Stable Diffusion 3 models. */
export const SD3_VAE: VaeConfig = {
  channels: 128,
  multipliers: [1, 2, 4, 4],
  resBlocks: 2,
  latentChannels: 16,
  imageChannels: 3,
  groups: VAE_GROUPS,
  latentScale: LATENT_SCALE,
  latentShift: LATENT_SHIFT,
};

/** openai/clip-vit-large-patch14, text half. */
export const CLIP_L: ClipConfig = {
  width: 768,
  layers: 12,
  heads: 12,
  mlpWidth: 3072,
  activation: 'quick_gelu',
  vocabSize: 49408,
  positions: 77,
  projection: false,
  pooledWidth: 768,
  bosId: 49406,
  eosId: 49407,
  padId: 49407,
};

/** laion/CLIP-ViT-bigG-14, text half. */
export const CLIP_G: ClipConfig = {
  width: 1280,
  layers: 32,
  heads: 20,
  mlpWidth: 5120,
  activation: 'gelu',
  vocabSize: 49408,
  positions: 77,
  projection: true,
  pooledWidth: 1280,
  bosId: 49406,
  eosId: 49407,
  padId: CLIP_G_PAD_ID,
};

/** google/t5-v1_1-xxl, encoder. */
export const T5_XXL: T5Config = {
  width: 4096,
  layers: 24,
  heads: 64,
  headDim: 64,
  mlpWidth: 10_240,
  vocabSize: 32_128,
  tokens: T5_DEFAULT_TOKENS,
  buckets: 32,
  maxDistance: T5_MAX_DISTANCE,
};
