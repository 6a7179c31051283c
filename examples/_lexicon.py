"""The hand-written German-English lexicon behind `_corpus.py`.

Plain tables, one word a line; `_corpus.py` parses and inflects them. An underscore
stands for a space. The English of every German word is unique within its table's
use, so a German sentence has exactly one translation.
"""

# German, gender (`~`: weak noun, every form but the nominative singular is the
# plural form), plural (`-`: mass noun), English, irregular English plural (or `.`),
# semantic class, and for places the preposition in both languages.
SHARED_NOUNS = """
Mann  m  Männer  man    men    person
Frau  f  Frauen  woman  women  person
"""

HOME_NOUNS = """
Mutter      f   Mütter      mother       .         person
Vater       m   Väter       father       .         person
Kind        n   Kinder      child        children  person
Schwester   f   Schwestern  sister       .         person
Bruder      m   Brüder      brother      .         person
Großmutter  f   Großmütter  grandmother  .         person
Großvater   m   Großväter   grandfather  .         person
Tante       f   Tanten      aunt         .         person
Onkel       m   Onkel       uncle        .         person
Nachbar     m~  Nachbarn    neighbour    .         person
Junge       m~  Jungen      boy          .         person
Mädchen     n   Mädchen     girl         .         person
Gast        m   Gäste       guest        .         person
Koch        m   Köche       cook         .         person
Suppe       f   Suppen      soup         .         meal
Kuchen      m   Kuchen      cake         .         pastry
Apfel       m   Äpfel       apple        .         food
Ei          n   Eier        egg          .         meal
Kartoffel   f   Kartoffeln  potato       potatoes  meal
Tomate      f   Tomaten     tomato       tomatoes  food
Birne       f   Birnen      pear         .         food
Salat       m   Salate      salad        .         food
Brot        n   -           bread        .         pastry
Käse        m   -           cheese       .         food
Milch       f   -           milk         .         drink
Kaffee      m   -           coffee       .         drink
Tee         m   -           tea          .         drink
Saft        m   -           juice        .         drink
Tasse       f   Tassen      cup          .         dish
Teller      m   Teller      plate        .         dish
Löffel      m   Löffel      spoon        .         dish
Messer      n   Messer      knife        knives    dish
Gabel       f   Gabeln      fork         .         dish
Topf        m   Töpfe       pot          .         dish
Schüssel    f   Schüsseln   bowl         .         dish
Tisch       m   Tische      table        .         furniture
Stuhl       m   Stühle      chair        .         furniture
Lampe       f   Lampen      lamp         .         furniture
Bett        n   Betten      bed          .         furniture
Schrank     m   Schränke    cupboard     .         opening
Fenster     n   Fenster     window       .         opening
Tür         f   Türen       door         .         opening
Hemd        n   Hemden      shirt        .         clothes
Kleid       n   Kleider     dress        dresses   clothes
Mantel      m   Mäntel      coat         .         clothes
Jacke       f   Jacken      jacket       .         clothes
Küche       f   Küchen      kitchen      .         place      in/in
Garten      m   Gärten      garden       .         place      in/in
Keller      m   Keller      cellar       .         place      in/in
Zimmer      n   Zimmer      room         .         place      in/in
Haus        n   Häuser      house        .         place      in/in
"""

TRAVEL_NOUNS = """
Kapitän     m   Kapitäne     captain       .          person
Matrose     m~  Matrosen     sailor        .          person
Fischer     m   Fischer      fisherman     fishermen  person
Tourist     m~  Touristen    tourist       .          person
Schaffner   m   Schaffner    conductor     .          person
Passagier   m   Passagiere   passenger     .          person
Händler     m   Händler      merchant      .          person
Maler       m   Maler        painter       .          person
Wächter     m   Wächter      guard         .          person
Ingenieur   m   Ingenieure   engineer      .          person
Schiff      n   Schiffe      ship          .          craft
Boot        n   Boote        boat          .          craft
Zug         m   Züge         train         .          craft
Fähre       f   Fähren       ferry         ferries    craft
Wagen       m   Wagen        wagon         .          craft
Koffer      m   Koffer       suitcase      .          luggage
Kiste       f   Kisten       crate         .          luggage
Fass        n   Fässer       barrel        .          luggage
Rucksack    m   Rucksäcke    backpack      .          luggage
Karte       f   Karten       map           .          gear
Kompass     m   Kompasse     compass       compasses  gear
Netz        n   Netze        net           .          gear
Anker       m   Anker        anchor        .          gear
Segel       n   Segel        sail          .          gear
Seil        n   Seile        rope          .          gear
Brücke      f   Brücken      bridge        .          sight
Turm        m   Türme        tower         .          sight
Burg        f   Burgen       castle        .          sight
Leuchtturm  m   Leuchttürme  lighthouse    .          sight
Hafen       m   Häfen        harbour       .          shore    in/in
Bahnhof     m   Bahnhöfe     station       .          place    an/at
Strand      m   Strände      beach         beaches    shore    an/on
Küste       f   Küsten       coast         .          shore    an/on
Insel       f   Inseln       island        .          shore    auf/on
Stadt       f   Städte       town          .          place    in/in
Dorf        n   Dörfer       village       .          place    in/in
Fluss       m   Flüsse       river         .          shore    an/at
Bucht       f   Buchten      bay           .          shore    in/in
Sturm       m   Stürme       storm         .          storm
Gewitter    n   Gewitter     thunderstorm  .          storm
Regen       m   -            rain          .          weather
Nebel       m   -            fog           .          weather
Wind        m   -            wind          .          storm
Schnee      m   -            snow          .          weather
"""

# German stem, English, the classes it suits, where it may stand (`a` before a noun,
# `p` after the verb to be).
SHARED_ADJECTIVES = """
alt    old        person,dish,furniture,clothes,craft,gear,sight,luggage       ap
jung   young      person                                                       ap
neu    new        dish,furniture,clothes,craft,gear,luggage,sight              ap
klein  small      meal,dish,furniture,opening,place,shore,craft,luggage,sight  a
groß   big        meal,dish,furniture,opening,place,shore,craft,luggage,sight  a
schön  beautiful  dish,furniture,clothes,place,shore,craft,sight               ap
rot    red        dish,furniture,clothes,craft,luggage                         ap
blau   blue       dish,furniture,clothes,craft,luggage                         ap
müde   tired      person                                                       p
"""

HOME_ADJECTIVES = """
hungrig     hungry       person                      ap
freundlich  friendly     person                      ap
fleißig     diligent     person                      ap
fröhlich    cheerful     person                      ap
frisch      fresh        food,pastry,drink           ap
warm        warm         meal,pastry,drink,clothes   ap
kalt        cold         meal,drink,place            ap
süß         sweet        food,pastry,drink           ap
lecker      tasty        meal,pastry,food            ap
sauber      clean        dish,clothes,place,opening  ap
schmutzig   dirty        dish,clothes,place,opening  ap
rund        round        dish,furniture              ap
bequem      comfortable  clothes                     ap
weich       soft         pastry,clothes              ap
bunt        colourful    clothes,dish,opening        ap
"""

TRAVEL_ADJECTIVES = """
mutig      brave        person               ap
erfahren   experienced  person               ap
fremd      foreign      person,craft         a
nass       wet          person,luggage,gear  ap
schnell    fast         craft                ap
langsam    slow         craft                ap
pünktlich  punctual     craft,person         ap
schwer     heavy        luggage,gear         ap
leer       empty        luggage,craft,place  ap
rostig     rusty        gear,craft           ap
steil      steep        shore                a
ruhig      calm         place,shore          ap
fern       distant      place,shore,sight    a
berühmt    famous       sight,person,place   ap
stark      strong       storm                ap
plötzlich  sudden       storm,weather        a
"""

# German infinitive (`auf|räumen`: separable), third person, participle (`+`: with the
# auxiliary sein), English, English past, then the frame: subject classes, what may
# follow (`d` dative person, `@` a place, `>` a destination, perhaps of one class, `.`
# nothing), object classes.
SHARED_VERBS = """
suchen   sucht   gesucht   look_for looked_for person @ dish,clothes,luggage,gear
finden   findet  gefunden  find     found      person @ dish,clothes,luggage,gear
sehen    sieht   gesehen   see      saw        person @ person,furniture,craft,sight
brauchen braucht gebraucht need     needed     person . dish,clothes,gear,food
zeigen   zeigt   gezeigt   show     showed     person d dish,clothes,gear,sight,craft
geben    gibt    gegeben   give     gave       person d food,drink,dish,luggage,gear
"""

HOME_VERBS = """
kochen     kocht    gekocht     cook  cooked  person @ meal
backen     backt    gebacken    bake  baked   person @ pastry
essen      isst     gegessen    eat   ate     person @ meal,pastry,food
probieren  probiert probiert    taste tasted  person . meal,pastry,food,drink
trinken    trinkt   getrunken   drink drank   person @ drink
waschen    wäscht   gewaschen   wash  washed  person @ clothes,dish
putzen     putzt    geputzt     clean cleaned person . opening,place
öffnen     öffnet   geöffnet    open  opened  person . opening
schließen  schließt geschlossen close closed  person . opening
auf|räumen räumt    aufgeräumt  tidy  tidied  person . place
nähen      näht     genäht      sew   sewed   person @ clothes
bügeln     bügelt   gebügelt    iron  ironed  person @ clothes
kaufen     kauft    gekauft     buy   bought  person . food,pastry,drink,dish,clothes
bringen    bringt   gebracht    bring brought person d food,meal,drink,dish
schlafen   schläft  geschlafen  sleep slept   person @ .
spielen    spielt   gespielt    play  played  person @ .
lachen     lacht    gelacht     laugh laughed person @ .
singen     singt    gesungen    sing  sang    person @ .
"""

TRAVEL_VERBS = """
fahren    fährt    +gefahren    travel  travelled person,craft  >      .
segeln    segelt   +gesegelt    sail    sailed    person        >shore .
an|kommen kommt    +angekommen  arrive  arrived   person,craft  @      .
warten    wartet   gewartet     wait    waited    person,craft  @      .
schwimmen schwimmt +geschwommen swim    swam      person        >shore .
beginnen  beginnt  begonnen     begin   began     storm,weather @      .
auf|hören hört     aufgehört    stop    stopped   storm,weather .      .
zerstören zerstört zerstört     destroy destroyed storm         @      sight,craft
beladen   belädt   beladen      load    loaded    person        @      craft
steuern   steuert  gesteuert    steer   steered   person        >      craft
packen    packt    gepackt      pack    packed    person        @      luggage
verlieren verliert verloren     lose    lost      person        @      luggage,gear
tragen    trägt    getragen     carry   carried   person        >      luggage,gear
malen     malt     gemalt       paint   painted   person        .      craft,sight,shore
besuchen  besucht  besucht      visit   visited   person        .      place,shore,sight
erreichen erreicht erreicht     reach   reached   person,craft  .      place,shore,sight
verlassen verlässt verlassen    leave   left      person,craft  .      place,shore
retten    rettet   gerettet     rescue  rescued   person        @      person,craft
mieten    mietet   gemietet     rent    rented    person        @      craft
bauen     baut     gebaut       build   built     person        @      craft,sight
"""

# German, English, the tenses it goes with (`n` present, `p` past, `f` future and
# modal verbs), and its English place (`mid`: before the main verb).
ADVERBS = """
heute         today           npf  end
jetzt         now             n    end
gestern       yesterday       p    end
letzte_Woche  last_week       p    end
morgen        tomorrow        f    end
bald          soon            f    end
am_Abend      in_the_evening  npf  end
am_Morgen     in_the_morning  npf  end
am_Montag     on_Monday       npf  end
am_Sonntag    on_Sunday       npf  end
jeden_Tag     every_day       nf   end
im_Winter     in_winter       npf  end
oft           often           np   mid
immer         always          np   mid
manchmal      sometimes       np   mid
"""

# Infinitive, forms for ich, du, er and wir/sie, English (`+to`: an ordinary verb).
MODALS = """
können  kann   kannst  kann  können  can
müssen  muss   musst   muss  müssen  must
sollen  soll   sollst  soll  sollen  should
dürfen  darf   darfst  darf  dürfen  may
werden  werde  wirst   wird  werden  will
wollen  will   willst  will  wollen  want+to
"""
