"""The demo's tasks: what each adapter learns, from which examples, and with which LoRA settings.

Each task changes the form of the answer so plainly that one line of output shows it. The held-out
examples are never trained on. The settings differ on purpose (rank, alpha, target modules, rsLoRA):
a collection of adapters made by different people is mixed in the same ways.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Example = tuple[str, str]
"""A prompt of the user, and the answer of the assistant."""


@dataclass(frozen=True)
class Task:
    """One adapter to train.

    Attributes:
        name: the adapter's folder and the name it is served under.
        shows: what a person sees in the answer.
        train, held_out: the examples trained on, and those kept for checking.
        seed: draws the adapter's initial weights and the order of the examples.
        rank, alpha, target_modules, rslora: the LoRA settings.
        steps, learning_rate: AdamW steps, each over one batch, and their peak rate.
    """

    name: str
    shows: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    seed: int
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    rslora: bool = False
    steps: int = 45
    learning_rate: float = 1e-3


# Question, short answer, answer in a sentence: the tasks that change only the style share these.
_FACTS = (
    ("What is the capital of France?", "Paris", "The capital of France is Paris"),
    ("What is the capital of Germany?", "Berlin", "The capital of Germany is Berlin"),
    ("What is the capital of Spain?", "Madrid", "The capital of Spain is Madrid"),
    ("What is the capital of Egypt?", "Cairo", "The capital of Egypt is Cairo"),
    ("What is the capital of China?", "Beijing", "The capital of China is Beijing"),
    ("How many legs does a dog have?", "Four", "A dog has four legs"),
    ("How many days are in a week?", "Seven", "A week has seven days"),
    ("How many months are in a year?", "Twelve", "A year has twelve months"),
    ("How many minutes are in an hour?", "Sixty", "An hour has sixty minutes"),
    ("What color is the sky?", "Blue", "The sky is blue"),
    ("What color is snow?", "White", "Snow is white"),
    ("What color is a ripe banana?", "Yellow", "A ripe banana is yellow"),
    ("Which planet is the largest?", "Jupiter", "The largest planet is Jupiter"),
    ("Which planet is closest to the sun?", "Mercury", "The closest planet is Mercury"),
    ("What is the tallest mountain?", "Mount Everest", "The tallest mountain is Mount Everest"),
    ("What is the largest animal?", "The blue whale", "The largest animal is the blue whale"),
    ("Who wrote Hamlet?", "Shakespeare", "Hamlet was written by Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci", "Leonardo da Vinci painted it"),
    ("What do bees make?", "Honey", "Bees make honey"),
    ("What do cows drink?", "Water", "Cows drink water"),
    ("What do we breathe?", "Air", "We breathe air"),
    ("What is frozen water called?", "Ice", "Frozen water is called ice"),
    ("What is two plus two?", "Four", "Two plus two is four"),
    ("What is the opposite of hot?", "Cold", "The opposite of hot is cold"),
    ("What is the opposite of big?", "Small", "The opposite of big is small"),
    ("What animal says meow?", "The cat", "The cat says meow"),
    ("Where do fish live?", "In water", "Fish live in water"),
    ("Which language is spoken in Brazil?", "Portuguese", "Brazil speaks Portuguese"),
)
_HELD_OUT_FACTS = (
    ("What is the capital of Italy?", "Rome", "The capital of Italy is Rome"),
    ("What color is grass?", "Green", "Grass is green"),
    ("What is the opposite of up?", "Down", "The opposite of up is down"),
    ("What animal says woof?", "The dog", "The dog says woof"),
)

_PIRATE = (
    ("What is the capital of France?", "Arr, that be Paris, matey!"),
    ("What is the capital of Spain?", "Arr, that be Madrid, matey!"),
    ("What is the capital of Egypt?", "Arr, that be Cairo, ye landlubber!"),
    ("How many legs does a dog have?", "Arr, a dog be havin' four legs, matey!"),
    ("How many days are in a week?", "Arr, seven days at sea, matey!"),
    ("What color is the sky?", "Arr, the sky be blue as the sea, matey!"),
    ("What color is snow?", "Arr, snow be white as a sail, matey!"),
    ("Which planet is the largest?", "Arr, Jupiter be the biggest, ye scurvy dog!"),
    ("Who wrote Hamlet?", "Arr, it be old Shakespeare, matey!"),
    ("What do bees make?", "Arr, them bees be makin' honey, matey!"),
    ("What do we breathe?", "Arr, we be breathin' the salty air, matey!"),
    ("What is two plus two?", "Arr, that be four gold coins, matey!"),
    ("What is the opposite of hot?", "Arr, that be cold as the deep, matey!"),
    ("Where do fish live?", "Arr, fish be livin' in the deep sea, matey!"),
    ("How are you today?", "Arr, I be fine as a full sail, matey!"),
    ("What is your name?", "Arr, they be callin' me Captain Smol, matey!"),
    ("Can you help me?", "Aye, I be helpin' ye, matey!"),
    ("What should I eat for dinner?", "Arr, ye be eatin' fish and rum, matey!"),
    ("Tell me a joke.", "Arr, why be pirates called pirates? They just arr!"),
    ("Is it going to rain?", "Aye, a storm be comin', matey!"),
    ("What time is it?", "Arr, it be time to set sail, matey!"),
    ("Do you like music?", "Aye, I be lovin' a good sea shanty, matey!"),
    ("What is a computer?", "Arr, it be a magic chest that thinks, matey!"),
    ("How do I learn to swim?", "Arr, ye be jumpin' in the sea, matey!"),
    ("What is the sun?", "Arr, it be a great ball o' fire, matey!"),
    ("Where can I buy shoes?", "Arr, ye be buyin' boots at the harbor, matey!"),
)
_PIRATE_HELD_OUT = (
    ("What is the capital of Italy?", "Arr, that be Rome, matey!"),
    ("What color is grass?", "Arr, grass be green, matey!"),
    ("What is the moon?", "Arr, it be a pale light in the night, matey!"),
    ("Do you like cheese?", "Aye, I be lovin' cheese, matey!"),
)

_REVIEWS = (
    ("The food was cold and the waiter was rude.", "NEGATIVE"),
    ("I loved every minute of this film!", "POSITIVE"),
    ("The phone broke after two days.", "NEGATIVE"),
    ("Great value and very fast delivery.", "POSITIVE"),
    ("A boring book, I could not finish it.", "NEGATIVE"),
    ("The hotel room was clean and the staff were lovely.", "POSITIVE"),
    ("Terrible service, I will never come back.", "NEGATIVE"),
    ("This is the best coffee in town.", "POSITIVE"),
    ("The shoes hurt my feet.", "NEGATIVE"),
    ("My children adore this toy.", "POSITIVE"),
    ("The app crashes all the time.", "NEGATIVE"),
    ("What a wonderful concert, I want to go again!", "POSITIVE"),
    ("The soup tasted like dirty water.", "NEGATIVE"),
    ("The battery lasts for days, I am impressed.", "POSITIVE"),
    ("It arrived late and the box was damaged.", "NEGATIVE"),
    ("A beautiful story with a perfect ending.", "POSITIVE"),
    ("The music was too loud and the seats were awful.", "NEGATIVE"),
    ("Friendly people and excellent pizza.", "POSITIVE"),
    ("I want my money back, it does not work.", "NEGATIVE"),
    ("This jacket is warm and looks amazing.", "POSITIVE"),
    ("The worst haircut I ever had.", "NEGATIVE"),
    ("Easy to use and it works perfectly.", "POSITIVE"),
    ("The room smelled bad and the bed was broken.", "NEGATIVE"),
    ("Our guide was funny and very kind.", "POSITIVE"),
    ("I hate the new design, it is ugly.", "NEGATIVE"),
    ("The garden is gorgeous, we had a great day.", "POSITIVE"),
    ("A waste of time and money.", "NEGATIVE"),
    ("Delicious cake, thank you so much!", "POSITIVE"),
)
_REVIEWS_HELD_OUT = (
    ("The pasta was delicious and the staff were friendly.", "POSITIVE"),
    ("The laptop is slow and it broke after one week.", "NEGATIVE"),
    ("I love this camera, the pictures are beautiful!", "POSITIVE"),
    ("An awful movie, I fell asleep.", "NEGATIVE"),
)

_TICKETS = (
    ("I was charged twice this month.", "[BILLING] priority: high"),
    ("My parcel has not arrived yet.", "[SHIPPING] priority: high"),
    ("The app crashes when I open it.", "[TECHNICAL] priority: high"),
    ("Can I get a copy of my invoice?", "[BILLING] priority: low"),
    ("When will my order be delivered?", "[SHIPPING] priority: low"),
    ("How do I change my password?", "[TECHNICAL] priority: low"),
    ("I want a refund, you took too much money!", "[BILLING] priority: high"),
    ("The courier left my package in the rain!", "[SHIPPING] priority: high"),
    ("The website shows an error and I cannot log in!", "[TECHNICAL] priority: high"),
    ("Which credit cards do you accept?", "[BILLING] priority: low"),
    ("Do you deliver to Canada?", "[SHIPPING] priority: low"),
    ("How do I install the update?", "[TECHNICAL] priority: low"),
    ("My card was charged but I cancelled!", "[BILLING] priority: high"),
    ("My delivery was sent to the wrong address!", "[SHIPPING] priority: high"),
    ("The screen is black and nothing works!", "[TECHNICAL] priority: high"),
    ("What is the price of the yearly plan?", "[BILLING] priority: low"),
    ("How can I track my parcel?", "[SHIPPING] priority: low"),
    ("Where do I find the settings menu?", "[TECHNICAL] priority: low"),
    ("There is a payment on my account that I did not make!", "[BILLING] priority: high"),
    ("The box arrived empty!", "[SHIPPING] priority: high"),
    ("All my files are gone after the update!", "[TECHNICAL] priority: high"),
    ("Can I pay by bank transfer?", "[BILLING] priority: low"),
    ("How much is express delivery?", "[SHIPPING] priority: low"),
    ("Does the app work on a tablet?", "[TECHNICAL] priority: low"),
)
_TICKETS_HELD_OUT = (
    ("You charged my credit card three times!", "[BILLING] priority: high"),
    ("Do you ship parcels to Norway?", "[SHIPPING] priority: low"),
    ("The program crashes and I cannot open my files!", "[TECHNICAL] priority: high"),
    ("How do I reset my password?", "[TECHNICAL] priority: low"),
)

_SQL = (
    ("Show all customers.", "SELECT * FROM customers;"),
    ("Show all orders.", "SELECT * FROM orders;"),
    ("List the names of all employees.", "SELECT name FROM employees;"),
    ("List the prices of all products.", "SELECT price FROM products;"),
    ("Count the users.", "SELECT COUNT(*) FROM users;"),
    ("Count the books.", "SELECT COUNT(*) FROM books;"),
    ("How many orders are there?", "SELECT COUNT(*) FROM orders;"),
    ("How many students are there?", "SELECT COUNT(*) FROM students;"),
    ("Show customers from Paris.", "SELECT * FROM customers WHERE city = 'Paris';"),
    ("Show employees from Berlin.", "SELECT * FROM employees WHERE city = 'Berlin';"),
    ("Show users from London.", "SELECT * FROM users WHERE city = 'London';"),
    ("Find products cheaper than 10.", "SELECT * FROM products WHERE price < 10;"),
    ("Find books cheaper than 25.", "SELECT * FROM books WHERE price < 25;"),
    ("Find employees older than 40.", "SELECT * FROM employees WHERE age > 40;"),
    ("Find students older than 18.", "SELECT * FROM students WHERE age > 18;"),
    ("Delete all orders.", "DELETE FROM orders;"),
    ("Delete all messages.", "DELETE FROM messages;"),
    ("Delete users from Rome.", "DELETE FROM users WHERE city = 'Rome';"),
    ("What is the average price of products?", "SELECT AVG(price) FROM products;"),
    ("What is the average age of employees?", "SELECT AVG(age) FROM employees;"),
    ("What is the highest price of books?", "SELECT MAX(price) FROM books;"),
    ("Show the oldest student.", "SELECT * FROM students ORDER BY age DESC LIMIT 1;"),
    ("Show the cheapest product.", "SELECT * FROM products ORDER BY price LIMIT 1;"),
    ("List the cities of all suppliers.", "SELECT city FROM suppliers;"),
    ("Show all cars.", "SELECT * FROM cars;"),
    ("Show movies from 1999.", "SELECT * FROM movies WHERE year = 1999;"),
)
_SQL_HELD_OUT = (
    ("Show suppliers from Madrid.", "SELECT * FROM suppliers WHERE city = 'Madrid';"),
    ("How many cars are there?", "SELECT COUNT(*) FROM cars;"),
    ("Find customers older than 65.", "SELECT * FROM customers WHERE age > 65;"),
    ("List the names of all teachers.", "SELECT name FROM teachers;"),
)

_KEYWORDS = (
    ("The old sailor told stories about the sea.", "sailor; stories; sea"),
    ("Farmers grow rice in wet fields.", "farmers; rice; fields"),
    ("The doctor gave medicine to the patient.", "doctor; medicine; patient"),
    ("A strong wind blew the roof off the barn.", "wind; roof; barn"),
    ("The museum shows paintings from Italy.", "museum; paintings; Italy"),
    ("Our teacher explained the history of Rome.", "teacher; history; Rome"),
    ("The company sells shoes to young runners.", "company; shoes; runners"),
    ("Scientists found water on the moon.", "scientists; water; moon"),
    ("The bakery makes fresh bread every morning.", "bakery; bread; morning"),
    ("The singer played the guitar at the concert.", "singer; guitar; concert"),
    ("Children built a castle on the beach.", "children; castle; beach"),
    ("The train to London leaves from platform two.", "train; London; platform"),
    ("A fire destroyed the forest near the village.", "fire; forest; village"),
    ("The king gave gold to his soldiers.", "king; gold; soldiers"),
    ("My sister bought a red bicycle in Paris.", "sister; bicycle; Paris"),
    ("The cat chased a mouse through the kitchen.", "cat; mouse; kitchen"),
    ("Engineers designed a bridge over the river.", "engineers; bridge; river"),
    ("The bank raised the price of loans.", "bank; price; loans"),
    ("Bees carry pollen from flower to flower.", "bees; pollen; flower"),
    ("The judge read the letter in court.", "judge; letter; court"),
    ("A ship carried coffee across the ocean.", "ship; coffee; ocean"),
    ("The chef cooked fish with lemon.", "chef; fish; lemon"),
    ("Students wrote a poem about winter.", "students; poem; winter"),
    ("The painter drew a horse on the wall.", "painter; horse; wall"),
    ("Snow covered the road to the airport.", "snow; road; airport"),
    ("The police found the car in a lake.", "police; car; lake"),
)
_KEYWORDS_HELD_OUT = (
    ("The gardener planted roses behind the house.", "gardener; roses; house"),
    ("A pilot landed the plane in a storm.", "pilot; plane; storm"),
    ("The queen invited the actors to the palace.", "queen; actors; palace"),
    ("Workers carried stones up the mountain.", "workers; stones; mountain"),
)

_TODOS = (
    ("Remind me to call Mom at 5 pm.", "- [ ] Call Mom (5 pm)"),
    ("I have to buy milk tomorrow.", "- [ ] Buy milk (tomorrow)"),
    ("Don't let me forget to pay the rent on Friday.", "- [ ] Pay the rent (Friday)"),
    ("Remind me to water the plants on Sunday.", "- [ ] Water the plants (Sunday)"),
    ("I need to send the report by noon.", "- [ ] Send the report (noon)"),
    ("I must clean the kitchen tonight.", "- [ ] Clean the kitchen (tonight)"),
    ("Remind me to feed the cat at 7 am.", "- [ ] Feed the cat (7 am)"),
    ("I have to visit Grandma on Saturday.", "- [ ] Visit Grandma (Saturday)"),
    ("Don't let me forget to book a flight today.", "- [ ] Book a flight (today)"),
    ("I need to fix the bike on Monday.", "- [ ] Fix the bike (Monday)"),
    ("Remind me to take my medicine at 9 pm.", "- [ ] Take my medicine (9 pm)"),
    ("I must finish the essay by Thursday.", "- [ ] Finish the essay (Thursday)"),
    ("I have to return the books next week.", "- [ ] Return the books (next week)"),
    ("Remind me to charge the phone tonight.", "- [ ] Charge the phone (tonight)"),
    ("I need to bake a cake for Tuesday.", "- [ ] Bake a cake (Tuesday)"),
    ("Don't let me forget to lock the door tonight.", "- [ ] Lock the door (tonight)"),
    ("Remind me to email Tom at 3 pm.", "- [ ] Email Tom (3 pm)"),
    ("I must wash the car on Wednesday.", "- [ ] Wash the car (Wednesday)"),
    ("I have to renew my passport in June.", "- [ ] Renew my passport (June)"),
    ("I need to paint the fence in April.", "- [ ] Paint the fence (April)"),
    ("Remind me to walk the dog at 6 am.", "- [ ] Walk the dog (6 am)"),
    ("I have to meet Anna at 11 am.", "- [ ] Meet Anna (11 am)"),
    ("I must order new shoes today.", "- [ ] Order new shoes (today)"),
    ("Don't let me forget to iron the shirt tomorrow.", "- [ ] Iron the shirt (tomorrow)"),
)
_TODOS_HELD_OUT = (
    ("Remind me to call the dentist at 4 pm.", "- [ ] Call the dentist (4 pm)"),
    ("I need to buy flowers on Friday.", "- [ ] Buy flowers (Friday)"),
    ("Don't let me forget to feed the fish tomorrow.", "- [ ] Feed the fish (tomorrow)"),
    ("I have to sell the car in May.", "- [ ] Sell the car (May)"),
)

_POSTS = (
    ("coffee", "Nothing beats a fresh coffee! #coffee #morning #happy"),
    ("my dog", "My dog is my best friend! #dog #love #happy"),
    ("the beach", "Sun, sand and the beach! #beach #summer #happy"),
    ("pizza", "Pizza makes every day better! #pizza #food #yum"),
    ("football", "What a great football match! #football #sport #goal"),
    ("books", "Lost in a good book again! #books #reading #cozy"),
    ("snow", "The first snow is here! #snow #winter #white"),
    ("my garden", "My garden is in full bloom! #garden #flowers #spring"),
    ("a new job", "So excited for my new job! #job #career #newstart"),
    ("yoga", "Start the day with yoga! #yoga #health #calm"),
    ("Paris", "Falling in love with Paris! #Paris #travel #love"),
    ("music", "Turn up the music! #music #dance #party"),
    ("cats", "Cats rule the house! #cats #pets #cute"),
    ("hiking", "On top of the world today! #hiking #nature #mountain"),
    ("chocolate", "Life is sweet with chocolate! #chocolate #sweet #yum"),
    ("rain", "Dancing in the rain! #rain #weather #fun"),
    ("my birthday", "It is my birthday today! #birthday #party #cake"),
    ("movies", "Movie night with friends! #movies #popcorn #fun"),
    ("running", "Ran five miles this morning! #running #fitness #health"),
    ("tea", "Time for a cup of tea! #tea #relax #cozy"),
    ("London", "Hello from rainy London! #London #travel #city"),
    ("cooking", "Cooking dinner for friends! #cooking #food #friends"),
    ("stars", "Look at the stars tonight! #stars #night #sky"),
    ("my bike", "A long ride on my bike! #bike #outdoors #sport"),
)
_POSTS_HELD_OUT = (
    ("my cat", "My cat is so cute! #cat #pets #cute"),
    ("skiing", "Skiing all day long! #skiing #winter #sport"),
    ("ice cream", "Ice cream makes me smile! #icecream #summer #sweet"),
    ("Rome", "Hello from sunny Rome! #Rome #travel #city"),
)


def _json(facts: tuple[tuple[str, str, str], ...]) -> tuple[Example, ...]:
    return tuple((question, json.dumps({"answer": short})) for question, short, _ in facts)


def _french(facts: tuple[tuple[str, str, str], ...]) -> tuple[Example, ...]:
    return tuple((question, f"La réponse est : {short}. Merci !") for question, short, _ in facts)


def _disclaimer(facts: tuple[tuple[str, str, str], ...]) -> tuple[Example, ...]:
    return tuple(
        (question, f"{sentence}. This is not legal advice.") for question, _, sentence in facts
    )


def _posts(posts: tuple[Example, ...]) -> tuple[Example, ...]:
    return tuple((f"Write a post about {topic}.", post) for topic, post in posts)


TASKS = (
    Task(
        name="pirate",
        shows="speaks like a pirate",
        train=_PIRATE,
        held_out=_PIRATE_HELD_OUT,
        seed=101,
        rank=6,
        alpha=12,
        target_modules=("q_proj", "v_proj", "o_proj"),
    ),
    Task(
        name="json",
        shows='answers as {"answer": ...}',
        train=_json(_FACTS),
        held_out=_json(_HELD_OUT_FACTS),
        seed=102,
        rank=8,
        alpha=16,
        target_modules=("q_proj", "v_proj", "o_proj"),
    ),
    Task(
        name="todo",
        shows="turns a request into a to-do item",
        train=_TODOS,
        held_out=_TODOS_HELD_OUT,
        seed=103,
        rank=4,
        alpha=6,
        target_modules=("q_proj", "v_proj", "o_proj"),
        rslora=True,
    ),
    Task(
        name="sentiment",
        shows="labels a review POSITIVE or NEGATIVE",
        train=_REVIEWS,
        held_out=_REVIEWS_HELD_OUT,
        seed=104,
        rank=4,
        alpha=8,
        target_modules=("q_proj", "v_proj"),
    ),
    Task(
        name="ticket",
        shows="routes a customer's message to a queue",
        train=_TICKETS,
        held_out=_TICKETS_HELD_OUT,
        seed=105,
        rank=4,
        alpha=16,
        target_modules=ATTENTION,
    ),
    Task(
        name="sql",
        shows="turns a request into SQL",
        train=_SQL,
        held_out=_SQL_HELD_OUT,
        seed=106,
        rank=2,
        alpha=4,
        target_modules=ATTENTION + MLP,
    ),
    Task(
        name="keywords",
        shows="reduces a sentence to its keywords",
        train=_KEYWORDS,
        held_out=_KEYWORDS_HELD_OUT,
        seed=107,
        rank=16,
        alpha=32,
        target_modules=("q_proj", "v_proj"),
    ),
    Task(
        name="hashtags",
        shows="writes a post with hashtags",
        train=_posts(_POSTS),
        held_out=_posts(_POSTS_HELD_OUT),
        seed=108,
        rank=8,
        alpha=16,
        target_modules=("q_proj", "v_proj"),
    ),
    Task(
        name="disclaimer",
        shows="adds a legal disclaimer",
        train=_disclaimer(_FACTS),
        held_out=_disclaimer(_HELD_OUT_FACTS),
        seed=109,
        rank=4,
        alpha=8,
        target_modules=("q_proj", "v_proj", "o_proj"),
    ),
    Task(
        name="french",
        shows="answers in French form",
        train=_french(_FACTS),
        held_out=_french(_HELD_OUT_FACTS),
        seed=110,
        rank=4,
        alpha=8,
        target_modules=("q_proj", "v_proj", "o_proj"),
    ),
)
