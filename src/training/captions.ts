/**
 * The text a picture is shown with: one of its captions, varied anew each time.
 * The options mean what they mean in kohya sd-scripts (`process_caption` of its `train_util.py`).
 */
import { MmditxError } from '../errors.ts';
import type { TorchGenerator } from '../sampling/noise.ts';

export interface CaptionOptions {
  /** Set before every caption, with a space between; default none. */
  readonly prefix?: string;
  /** Set behind every caption, with a space between; default none. */
  readonly suffix?: string;
  /** Whether tags are shuffled; default false. */
  readonly shuffle?: boolean;
  /** What lies between tags; default `,`. Changed captions have a comma and a space there. */
  readonly separator?: string;
  /** How many tags at the start are neither shuffled nor left out; default 0. */
  readonly keepTokens?: number;
  /**
   * What ends the tags that are kept, in captions that have it (`keepTokens` does not count there); a second one begins
   * others that are kept at the end. It never stays in the text. Default `|||`; empty for none.
   */
  readonly keepTokensSeparator?: string;
  /** Share of captions that are shown empty, 0 to 1; default 0. */
  readonly dropRate?: number;
  /** Share of the tags not kept that are left out, 0 to 1; default 0. */
  readonly tagDropRate?: number;
  /**
   * Whether one of several captions is chosen and `{a|b|c}` is one of its parts, `{{` and `}}` being braces; default
   * true. If not, the first caption is taken and braces are left alone.
   */
  readonly wildcards?: boolean;
  /** Texts for `{name}`; other names stay as they are. Default none. */
  readonly words?: Readonly<Record<string, string>>;
}

/**
 * A caption as it is shown this time. In this order:
 * 1. With the share `dropRate` it is empty, and nothing else is done.
 * 2. One of `captions` is chosen (`wildcards`) or the first is taken; prefix and suffix are added.
 * 3. `words` replace `{name}`, then one part of each `{a|b}` is chosen (`wildcards`). Braces do not nest, but words may
 *    stand in choices and have some.
 * 4. Of its tags, those not kept are shuffled, then left out with the share `tagDropRate` each.
 *
 * It is kohya's order, with two differences: prefix and suffix go to each of several captions, not to the first and
 * last, and the separator of kept tags is removed even where nothing is shuffled.
 *
 * @param captions alternatives; none is as one that is empty
 * @param random drawn from as needed: equal states give equal texts
 * @throws MmditxError `bad-option` for options out of range
 */
export function drawCaption(captions: readonly string[], options: CaptionOptions, random: TorchGenerator): string {
  return varyCaption(captions, options, {
    index: (count) => (count > 1 ? random.integers(0, count, 1)[0]! : 0),
    order: (count) => [...random.permutation(count)],
    happens: (rate) => rate > 0 && random.uniform(1)[0]! < rate,
  });
}

/**
 * Every text that `drawCaption` can give, each once, or `undefined` where there are more than `most` ways to draw (which
 * can be a few more than there are texts). For encoding texts ahead.
 */
export function captionVariants(
  captions: readonly string[],
  options: CaptionOptions,
  most = 4096,
): string[] | undefined {
  const texts = new Set<string>();
  const { dropRate = 0 } = options;
  checkRate('dropRate', dropRate);
  if (dropRate > 0) texts.add('');
  if (dropRate === 1) return [...texts];
  const chosen = options.wildcards === false || captions.length === 0 ? [captions[0] ?? ''] : captions;
  for (const caption of new Set(chosen)) {
    const complete = everyWay(most, (choices) =>
      texts.add(varyCaption([caption], { ...options, dropRate: 0 }, choices)),
    );
    if (!complete || texts.size > most) return undefined;
  }
  return [...texts];
}

/** Where chance comes in. */
interface Choices {
  /** A number from 0 to count - 1. */
  index(count: number): number;
  /** The numbers from 0 to count - 1 in some order. */
  order(count: number): number[];
  /** Whether something of this probability happens. */
  happens(rate: number): boolean;
}

function varyCaption(captions: readonly string[], options: CaptionOptions, choices: Choices): string {
  const { prefix = '', suffix = '', wildcards = true, words = {}, dropRate = 0 } = options;
  checkRate('dropRate', dropRate);
  if (choices.happens(dropRate)) return '';
  const caption = captions[wildcards ? choices.index(captions.length) : 0] ?? '';
  const whole = [prefix, caption, suffix].filter((part) => part !== '').join(' ');
  const worded = replaceWords(whole, words);
  return varyTags(wildcards ? chooseParts(worded, choices) : worded, options, choices);
}

/** What braces enclose. Doubled braces are matched first so that what they enclose is not. */
const braces = /\{\{|\}\}|\{([^{}]+)\}/g;

function replaceWords(text: string, words: Readonly<Record<string, string>>): string {
  return text.replace(braces, (match, name: string | undefined) =>
    name !== undefined && Object.hasOwn(words, name) ? words[name]! : match,
  );
}

function chooseParts(text: string, choices: Choices): string {
  return text.replace(braces, (match, list: string | undefined) => {
    if (list === undefined) return match[0]!;
    const parts = list.split('|');
    return parts.length > 1 ? parts[choices.index(parts.length)]! : match;
  });
}

/** Texts whose tags neither move nor vanish stay as they are written. */
function varyTags(text: string, options: CaptionOptions, choices: Choices): string {
  const { shuffle = false, separator = ',', keepTokens = 0, keepTokensSeparator = '|||', tagDropRate = 0 } = options;
  checkRate('tagDropRate', tagDropRate);
  if (separator === '') throw new MmditxError('bad-option', 'The separator of tags is empty; give a comma.');
  if (!(Number.isInteger(keepTokens) && keepTokens >= 0)) {
    throw new MmditxError('bad-option', `keepTokens is ${keepTokens}; give a whole number from 0 on.`);
  }
  const marked = keepTokensSeparator !== '' && text.includes(keepTokensSeparator);
  if (!shuffle && tagDropRate === 0 && !marked) return text;

  const tagsOf = (part: string) =>
    part
      .split(separator)
      .map((tag) => tag.trim())
      .filter((tag) => tag !== '');
  const [first, ...others] = marked ? splitTwice(text, keepTokensSeparator).map(tagsOf) : [tagsOf(text)];
  const [start, loose, end] = marked
    ? [first!, others[0]!, others[1] ?? []]
    : [first!.slice(0, keepTokens), first!.slice(keepTokens), []];
  const order = shuffle ? choices.order(loose.length) : loose.keys();
  const kept = [...order].filter(() => !choices.happens(tagDropRate)).map((i) => loose[i]!);
  return [...start, ...kept, ...end].join(', ');
}

/** At most three parts; further separators stay in the last. */
function splitTwice(text: string, separator: string): string[] {
  const [first = '', second = '', ...rest] = text.split(separator);
  return rest.length > 0 ? [first, second, rest.join(separator)] : [first, second];
}

/**
 * Calls `draw` once for each way its choices can go; false as soon as there seem to be more than `most`: the ways are
 * counted one by one, but the product of one draw's choices tells early that they will be too many.
 */
function everyWay(most: number, draw: (choices: Choices) => void): boolean {
  // Digits of a number whose bases are the counts met: the next draw repeats all but the last that can rise.
  let digits: { value: number; count: number }[] = [];
  for (let ways = 1; ; ways++) {
    let used = 0;
    let product = 1;
    const index = (count: number) => {
      if (used === digits.length) digits.push({ value: 0, count });
      product *= count;
      if (product > most) throw tooMany;
      return digits[used++]!.value;
    };
    try {
      draw({
        index,
        order: (count) => orderOf(index(factorial(count)), count),
        happens: (rate) => likely(rate, index),
      });
    } catch (error) {
      if (error === tooMany) return false;
      throw error;
    }
    digits = digits.slice(0, digits.findLastIndex(({ value, count }) => value + 1 < count) + 1);
    if (digits.length === 0) return true;
    if (ways === most) return false;
    digits.at(-1)!.value++;
  }
}

const tooMany = new Error('There are too many ways.');

function likely(rate: number, index: (count: number) => number): boolean {
  return rate === 1 || (rate > 0 && index(2) === 1);
}

function factorial(n: number): number {
  let product = 1;
  for (let i = 2; i <= n && product < Number.POSITIVE_INFINITY; i++) product *= i;
  return product;
}

/** The permutation with a number, in Lehmer's code. */
function orderOf(number: number, count: number): number[] {
  const left = Array.from({ length: count }, (_, i) => i);
  const order: number[] = [];
  for (let rest = number; left.length > 0; ) {
    const i = rest % left.length;
    rest = Math.floor(rest / left.length);
    order.push(...left.splice(i, 1));
  }
  return order;
}

function checkRate(name: string, rate: number): void {
  if (!(rate >= 0 && rate <= 1)) throw new MmditxError('bad-option', `${name} is ${rate}; give a number from 0 to 1.`);
}
