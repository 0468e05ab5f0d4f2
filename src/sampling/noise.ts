/**
 * Random numbers equal to PyTorch's CPU generator, so that a seed means the same picture here as in the reference
 * implementations of Stable Diffusion 3.5, all of which draw their noise from that generator.
 *
 * The bit source is MT19937 (Matsumoto & Nishimura, "Mersenne Twister", 1998). How floats are made of its words follows
 * PyTorch 2.x; floats of `normal` are within 5e-7 of it, one in six by a last bit, because PyTorch's vectorised
 * logarithm and cosine are themselves approximations.
 */
import { MmditxError } from '../errors.ts';

/** Words of state in MT19937, and the distance between the words it mixes. */
const MT_WORDS = 624;
const MT_MIDDLE = 397;

/** PyTorch fills normal floats in blocks of this many values; shorter draws take a different path. */
const NORMAL_BLOCK = 16;

/** From this many possible values on, PyTorch makes bounded integers of 64-bit draws. */
const INTEGER_RANGE_LIMIT = 2 ** 28;

const TAU_F32 = Math.fround(2 * Math.PI);

/** Everything needed to continue a generator's stream; survives `JSON.stringify`. */
export interface TorchGeneratorState {
  /** The 624 state words of MT19937, each an unsigned 32-bit integer. */
  readonly words: readonly number[];
  /** How many of the words are spent, 0..624. */
  readonly position: number;
  /** The second value of the last Box-Muller pair of a short `normal` draw, or null when none is waiting. */
  readonly waitingNormal: number | null;
}

export interface TorchGenerator {
  /** `torch.randn(count)` in float32. */
  normal(count: number): Float32Array;
  /** `torch.rand(count)` in float32: multiples of 2^-24 in [0, 1). */
  uniform(count: number): Float32Array;
  /** `torch.randint(low, high, (count,))`: integers in [low, high). Throws `RangeError` unless 0 < high - low < 2^28. */
  integers(low: number, high: number, count: number): number[];
  /** `torch.randperm(n)`: the numbers 0..n-1 in random order. */
  permutation(n: number): Uint32Array;
  /** A copy of the state; hand it to `torchGenerator` to continue the stream from here. */
  state(): TorchGeneratorState;
}

/**
 * A generator equal to `torch.Generator('cpu').manual_seed(seed)`, or one that continues from a saved state.
 *
 * @param seed an integer from 0 to 2^64 - 1; beyond 2^53 only a bigint is exact. As in PyTorch, MT19937 sees its lowest
 *   32 bits only.
 * @throws MmditxError `bad-option` for a seed or a state out of range.
 */
export function torchGenerator(seed: number | bigint | TorchGeneratorState): TorchGenerator {
  const restored = typeof seed === 'object' ? checkedState(seed) : undefined;
  const words = restored ? Uint32Array.from(restored.words) : seedWords(lowWord(seed as number | bigint));
  let position = restored?.position ?? MT_WORDS;
  let waitingNormal = restored?.waitingNormal ?? null;

  function nextWord(): number {
    if (position === MT_WORDS) {
      twist(words);
      position = 0;
    }
    let word = words[position++]!;
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  }

  /** 24 random bits as a float32 in [0, 1). */
  const nextFloat = () => (nextWord() & 0xffffff) / 2 ** 24;

  /** 53 random bits as a double in [0, 1); the first word is the high one. */
  function nextDouble(): number {
    const high = nextWord();
    return ((high & 0x1fffff) * 2 ** 32 + nextWord()) / 2 ** 53;
  }

  function uniform(count: number): Float32Array {
    const values = new Float32Array(count);
    for (let i = 0; i < count; i++) values[i] = nextFloat();
    return values;
  }

  /** One value of a short draw: Box-Muller in double precision, its second value kept for the next call. */
  function nextNormal(): number {
    if (waitingNormal !== null) {
      const value = waitingNormal;
      waitingNormal = null;
      return value;
    }
    const angle = 2 * Math.PI * nextDouble();
    const radius = Math.sqrt(-2 * Math.log1p(-nextDouble()));
    waitingNormal = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }

  return {
    uniform,

    normal(count) {
      if (count < NORMAL_BLOCK) return Float32Array.from({ length: count }, nextNormal);
      const values = uniform(count);
      const whole = count - (count % NORMAL_BLOCK);
      for (let start = 0; start < whole; start += NORMAL_BLOCK) boxMuller(values, start);
      if (whole < count) {
        // The last block is drawn anew and overwrites the end of the one before it.
        const tail = count - NORMAL_BLOCK;
        values.set(uniform(NORMAL_BLOCK), tail);
        boxMuller(values, tail);
      }
      return values;
    },

    integers(low, high, count) {
      const range = high - low;
      if (!(Number.isSafeInteger(low) && Number.isSafeInteger(high) && range > 0 && range < INTEGER_RANGE_LIMIT)) {
        throw new RangeError(`Cannot draw integers from [${low}, ${high}): the range must hold 1 to 2^28 - 1 values.`);
      }
      return Array.from({ length: count }, () => low + (nextWord() % range));
    },

    permutation(n) {
      const order = Uint32Array.from({ length: n }, (_, i) => i);
      for (let i = 0; i < n - 1; i++) {
        const j = i + (nextWord() % (n - i));
        const chosen = order[j]!;
        order[j] = order[i]!;
        order[i] = chosen;
      }
      return order;
    },

    state: () => ({ words: Array.from(words), position, waitingNormal }),
  };
}

/**
 * The noise source of the stochastic samplers for one run: call k returns the k-th draw of `count` values.
 *
 * The stream is seeded with `seed + 1`, as ComfyUI does on the CPU so that it differs from the initial latent's, which
 * makes `euler_ancestral` and `lcm` repeat ComfyUI's CPU results. ComfyUI feeds its SDE samplers from a Brownian tree
 * instead, which is not reproduced here: `dpmpp_sde` and `dpmpp_2m_sde` have the same distribution but other pictures.
 */
export function samplerNoise(seed: number | bigint, count: number): () => Float32Array {
  // The low word of seed + 1 depends on the low word of the seed alone.
  const generator = torchGenerator((lowWord(seed) + 1) % 2 ** 32);
  return () => generator.normal(count);
}

/** The standard initialisation of MT19937 from 32 bits (Matsumoto & Nishimura 2002, `init_genrand`). */
function seedWords(seed: number): Uint32Array {
  const words = new Uint32Array(MT_WORDS);
  words[0] = seed;
  for (let i = 1; i < MT_WORDS; i++) {
    const previous = words[i - 1]!;
    words[i] = Math.imul(1812433253, previous ^ (previous >>> 30)) + i;
  }
  return words;
}

/** Replaces the spent state words by the next ones. */
function twist(words: Uint32Array): void {
  for (let i = 0; i < MT_WORDS; i++) {
    const mixed = (words[i]! & 0x80000000) | (words[(i + 1) % MT_WORDS]! & 0x7fffffff);
    words[i] = words[(i + MT_MIDDLE) % MT_WORDS]! ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
  }
}

/**
 * Turns 16 uniforms into 16 normals in place: the first eight give the radii, the other eight the angles.
 * Every intermediate is rounded to float32 as in PyTorch; an angle kept in double would move values by up to 1e-6.
 */
function boxMuller(values: Float32Array, start: number): void {
  const half = NORMAL_BLOCK / 2;
  for (let i = start; i < start + half; i++) {
    const logarithm = Math.fround(Math.log(1 - values[i]!));
    const radius = Math.fround(Math.sqrt(-2 * logarithm));
    const angle = Math.fround(TAU_F32 * values[i + half]!);
    values[i] = radius * Math.fround(Math.cos(angle));
    values[i + half] = radius * Math.fround(Math.sin(angle));
  }
}

function lowWord(seed: number | bigint): number {
  const valid = typeof seed === 'bigint' ? seed >= 0n && seed < 2n ** 64n : Number.isInteger(seed) && seed >= 0;
  if (!valid || seed >= 2 ** 64) {
    throw new MmditxError('bad-option', `The seed ${seed} is not an integer from 0 to 2^64 - 1.`);
  }
  return Number(BigInt(seed) & 0xffffffffn);
}

function checkedState(state: TorchGeneratorState): TorchGeneratorState {
  const { words, position, waitingNormal } = state;
  const isWord = (word: unknown) => Number.isInteger(word) && (word as number) >= 0 && (word as number) < 2 ** 32;
  const valid =
    Array.isArray(words) &&
    words.length === MT_WORDS &&
    words.every(isWord) &&
    isWord(position) &&
    position <= MT_WORDS &&
    (waitingNormal === null || Number.isFinite(waitingNormal));
  if (!valid) {
    throw new MmditxError(
      'bad-option',
      'The saved random generator state is damaged; start again from a seed instead.',
    );
  }
  return state;
}
