"""Codes of languages, as the splitting of sentences knows them."""

import difflib

from .errors import InputError

# ISO 639-1, with English names
_TWO_LETTERS = """
aa Afar, ab Abkhazian, ae Avestan, af Afrikaans, ak Akan, am Amharic, an Aragonese, ar Arabic, as Assamese, av Avaric,
ay Aymara, az Azerbaijani, ba Bashkir, be Belarusian, bg Bulgarian, bi Bislama, bm Bambara, bn Bengali, bo Tibetan,
br Breton, bs Bosnian, ca Catalan, ce Chechen, ch Chamorro, co Corsican, cr Cree, cs Czech, cu Church Slavic,
cv Chuvash, cy Welsh, da Danish, de German, dv Divehi, dz Dzongkha, ee Ewe, el Greek, en English, eo Esperanto,
es Spanish, et Estonian, eu Basque, fa Persian, ff Fulah, fi Finnish, fj Fijian, fo Faroese, fr French,
fy Western Frisian, ga Irish, gd Scottish Gaelic, gl Galician, gn Guarani, gu Gujarati, gv Manx, ha Hausa, he Hebrew,
hi Hindi, ho Hiri Motu, hr Croatian, ht Haitian, hu Hungarian, hy Armenian, hz Herero, ia Interlingua, id Indonesian,
ie Interlingue, ig Igbo, ii Sichuan Yi, ik Inupiaq, io Ido, is Icelandic, it Italian, iu Inuktitut, ja Japanese,
jv Javanese, ka Georgian, kg Kongo, ki Kikuyu, kj Kuanyama, kk Kazakh, kl Kalaallisut, km Khmer, kn Kannada, ko Korean,
kr Kanuri, ks Kashmiri, ku Kurdish, kv Komi, kw Cornish, ky Kyrgyz, la Latin, lb Luxembourgish, lg Ganda,
li Limburgish, ln Lingala, lo Lao, lt Lithuanian, lu Luba-Katanga, lv Latvian, mg Malagasy, mh Marshallese, mi Maori,
mk Macedonian, ml Malayalam, mn Mongolian, mr Marathi, ms Malay, mt Maltese, my Burmese, na Nauru, nb Norwegian Bokmål,
nd North Ndebele, ne Nepali, ng Ndonga, nl Dutch, nn Norwegian Nynorsk, no Norwegian, nr South Ndebele, nv Navajo,
ny Chichewa, oc Occitan, oj Ojibwa, om Oromo, or Odia, os Ossetian, pa Punjabi, pi Pali, pl Polish, ps Pashto,
pt Portuguese, qu Quechua, rm Romansh, rn Rundi, ro Romanian, ru Russian, rw Kinyarwanda, sa Sanskrit, sc Sardinian,
sd Sindhi, se Northern Sami, sg Sango, si Sinhala, sk Slovak, sl Slovenian, sm Samoan, sn Shona, so Somali,
sq Albanian, sr Serbian, ss Swati, st Southern Sotho, su Sundanese, sv Swedish, sw Swahili, ta Tamil, te Telugu,
tg Tajik, th Thai, ti Tigrinya, tk Turkmen, tl Tagalog, tn Tswana, to Tonga, tr Turkish, ts Tsonga, tt Tatar, tw Twi,
ty Tahitian, ug Uighur, uk Ukrainian, ur Urdu, uz Uzbek, ve Venda, vi Vietnamese, vo Volapük, wa Walloon, wo Wolof,
xh Xhosa, yi Yiddish, yo Yoruba, za Zhuang, zh Chinese, zu Zulu
"""
NAMES = dict(entry.strip().split(" ", 1) for entry in _TWO_LETTERS.replace("\n", " ").split(","))
# ISO 639-3 codes without a shorter one that sentencex 1.0.32 has rules for, most of them another language's.
_THREE_LETTERS = """
abs ace ady aeb aln als alt ami anp arn arq ary arz ast atj avk awa azb ban bar bbc bcc bci bdr bew bgn bho bjn blk
bpy bqi btm bug bxr cbk cdo ceb cps crh csb cpx dag dsb dtp dty egl eml ext fit fon frc frp frr fur gag gan gcf gcr
glk gld gom gor gsw guc hak hif hil hke hno hrx hsb hyw inh jam jut kaa kab kbd kbp kcg kea kge khw kiu kjh kjp knc
koi krc kri krj krl ksh ksw kum lad lbe lez lfn lij liv lki lld lmo ltg lrc luz lus lzh lzz mad mag mai mdf mhr min
mni mnw mos mrj mui mwl myv mzn nah nan nap nds new nia nit niu nog nqo nrm nys olo pag pam pap pcd pcm pdc pdt pfl
pms pnb pnt pwn qqq qug rgn rif rki rmc rmf rmy rsk rue rup ruq ryu sah sat scn sco sdc sdh sei ses sgs shi shn shy
sjd skr sli sma smn sms srn srq stq sty syl szl szy tay tcy tet tkr tly tpi trv tru tum tyv udm vec vep vls vmf vmw
vot vro war wls wuu xal xmf yue zea zgh
"""
THREE_LETTERS = frozenset(_THREE_LETTERS.split())


def checked_language(code: str) -> str:
    """The code of a language, its region cut off: `de` of `de-DE` and `DE`. Raises `InputError` for what is none."""
    short = code.strip().lower().replace("_", "-").partition("-")[0]
    if short in NAMES or short in THREE_LETTERS:
        return short
    by_name = {name.lower(): short for short, name in NAMES.items()}
    [near] = difflib.get_close_matches(short, [*by_name, *NAMES], n=1, cutoff=0.5) or ["english"]
    near = by_name.get(near, near)
    raise InputError(
        f"language is {code!r}, expected an ISO 639 code such as de or pt-BR: did you mean {near!r} ({NAMES[near]})?"
    )
